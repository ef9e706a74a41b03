// Where everything lies in a block's memory: planned on the host, for the shared memory there is.
#pragma once

#include <fastmeta/launch_inner_loop.h>

#include "products.h"

namespace fastmeta::cuda {

constexpr int kInnerThreads = 256;  // at most

namespace inner_layout {

// Rows an odd number of times four elements long: eight of them start in different banks.
inline int apart(int n) { return 4 * (divide_up(n, 4) | 1); }

struct Carver {
  int64_t used = 0;
  int take(int64_t rows, int64_t ld) {
    const int64_t at = used;
    used += (rows * ld + 3) & ~int64_t(3);
    return int(at);
  }
};

inline bool bent(const InnerLoop& p) {
  return p.activation != Activation::identity && p.activation != Activation::relu;
}

inline void states(InnerLoop& p) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 4;  // the bridge refuses a block's memory of that size
  Carver c;
  int64_t end = 0;
  for (int l = p.layers - 1; l >= 0; --l) {
    InnerLayer& a = p.layer[l];
    a.columns = a.in + p.biased;
    a.ldw = a.ld_in = apart(a.columns);
    if (l < p.first) continue;
    // Products read whole fours of rows, those that are too many times zero: it must be weights that lie there, of the
    // layers behind, or zeros behind the last.
    const int64_t needed = c.used + int64_t(whole(a.out)) * a.ldw;
    end = needed > end ? needed : end;
    a.rows = l > p.first ? a.out : int(smaller<int64_t>(divide_up<int64_t>(end - c.used, a.ldw), kMost));
    a.at = c.take(a.rows, a.ldw);
  }
  p.first_state = int(c.used);
  if (p.first) {
    InnerLayer& a = p.layer[0];
    a.columns = a.out;
    a.ldw = whole(a.out);
    a.rows = whole(p.support.rows);
    a.at = c.take(a.rows, a.ldw);
  }
  p.state = int(smaller(c.used, kMost));
}

// The support rows' record of one step.
inline void record(InnerLoop& p, bool second, Carver& c) {
  const int64_t rows = p.support.rows;
  p.record = int(c.used);
  for (int l = 0; l < p.layers; ++l) {
    InnerLayer& a = p.layer[l];
    InnerPlaces& s = a.support;
    s = {};
    if (l + 1 < p.layers) {
      const int ld = p.layer[l + 1].ld_in;
      s.value = c.take(rows, ld);
      s.slope = bent(p) ? c.take(rows, ld) : s.value;
      s.bend = bent(p) && second ? c.take(rows, ld) : 0;
    }
    s.ld_delta = whole(a.out);
    s.delta = c.take(rows, s.ld_delta);
  }
  const int64_t logits = rows * whole(p.layer[p.layers - 1].out), paths = p.support.paths.count;
  p.curve = second ? c.take(1, logits > paths ? logits : paths) : 0;
  p.record_size = int(c.used) - p.record;
}

// Query rows: going back, deltas take the place of what they are multiplied by.
inline void query(InnerLoop& p, Carver& c) {
  const int64_t rows = p.chunk;
  p.ld_query_x = p.ldx;
  p.query_x = c.take(rows, p.ldx);
  for (int l = 0; l < p.layers; ++l) {
    InnerPlaces& q = p.layer[l].query;
    q = {};
    if (l + 1 < p.layers) {
      q.ld_delta = p.layer[l + 1].ld_in;
      q.value = c.take(rows, q.ld_delta);
      q.slope = q.delta = bent(p) ? c.take(rows, q.ld_delta) : q.value;
    } else {
      q.ld_delta = whole(p.layer[l].out);
      q.delta = c.take(rows, q.ld_delta);
    }
  }
}

// Most take the place of what they are the last to need: the last layer's deltas that of the loss's curvature, its
// logits that of the deltas below, the first layer's deltas that of what they are the tangents of.
inline void tangents(InnerLoop& p, Carver& c) {
  const int last = p.layers - 1, rows = p.support.rows;
  for (int l = 0; l < last; ++l) {
    InnerLayer& a = p.layer[l];
    a.dot_value = c.take(rows, p.layer[l + 1].ld_in);
    const bool needed = l > 0 || (p.d_support_x && !p.first);
    a.dot_delta = needed ? c.take(rows, a.support.ld_delta) : a.support.delta;
  }
  const int ld = p.layer[last].support.ld_delta;
  const bool fits = last > 0 && ld <= p.layer[last - 1].support.ld_delta && p.loss != Loss::maximum_entropy;
  p.dot_logits = fits ? p.layer[last - 1].dot_delta : c.take(rows, ld);
  p.layer[last].dot_delta = p.loss == Loss::maximum_entropy ? p.dot_logits : p.curve;
}

// Layers that one is summed up after the other begin with the warp behind the last one's last.
inline void turns(InnerLoop& p) {
  int warps = 0;
  for (int l = p.first; l < p.layers; ++l) {
    InnerLayer& a = p.layer[l];
    a.turn = 32 * warps;
    const int64_t tiles = int64_t(divide_up(a.out, 4)) * divide_up(a.columns, 4);
    warps = int((warps + divide_up<int64_t>(tiles, 32)) % (p.threads / 32));
  }
}

// Elements of a block's memory.
struct Sizes {
  int64_t states, rows;
};

// Places for everything.
inline Sizes place(InnerLoop& p, bool backward, bool has_query, int chunk) {
  p.chunk = chunk;
  p.plain = p.momentum == 0 && p.weight_decay == 0 && !p.elementwise;
  p.sweeps = p.curvature = p.wants_rates = 0;
  if (backward && p.steps > 0) {
    p.wants_rates = p.d_rates.data != nullptr;
    for (int l = p.first; l < p.layers; ++l)
      p.wants_rates |= p.layer[l].d_weight_rate.data || p.layer[l].d_bias_rate.data;
    p.curvature = !p.first_order;
    p.sweeps = p.curvature || p.wants_rates || p.weight_decay != 0;
  }
  p.keeps_moments = p.wants_rates && p.momentum != 0;
  states(p);
  turns(p);
  Carver kept;
  const auto state = [&](bool wanted) { return wanted ? kept.take(1, p.state) : 0; };
  p.weights = state(true);
  p.adjoint = state(backward);
  p.direction = backward && p.sweeps && !p.plain ? state(true) : p.adjoint;
  p.moment_adjoint = state(p.sweeps && p.momentum != 0);
  p.moment = state(p.momentum != 0);
  Carver c;
  p.ldx = p.first ? whole(p.support.rows) : p.layer[0].ld_in;
  p.layer[0].ld_in = p.ldx;
  p.x = c.take(p.support.rows, p.ldx);
  const int paths = p.support.paths.count, query_paths = p.query.paths.count;
  p.path_room = c.take(2, whole(paths > query_paths ? paths : query_paths));
  // What is not needed at the same time shares its place: a step's rows outlive the query rows only going backward.
  Carver steps = c;
  record(p, p.curvature, steps);
  if (backward) c = steps;
  Carver query_rows = c, dots = c, sums = c;
  if (has_query) query(p, query_rows);
  if (p.curvature) tangents(p, dots);
  p.sums = sums.take(p.layers, p.threads + 8);
  int64_t used = steps.used;
  for (const Carver& other : {query_rows, dots, sums}) used = other.used > used ? other.used : used;
  p.kept_states = 0;
  p.kept_records = p.sweeps ? int64_t(p.steps) * p.state : 0;
  p.kept_moments = p.kept_records + (p.sweeps ? int64_t(p.steps - 1) * p.record_size : 0);
  p.kept = p.kept_moments + (p.keeps_moments ? int64_t(p.steps) * p.state : 0);
  return {kept.used + 4, used + 4};
}

// Threads that suit the most tiles that a product has. A small net has fewer where there are tasks enough to keep every
// multiprocessor busy.
inline int threads_for(const InnerLoop& p) {
  const int64_t rows = p.query.rows > p.support.rows ? p.query.rows : p.support.rows;
  int64_t most = 0;
  for (int l = 0; l < p.layers; ++l) {
    const InnerLayer& a = p.layer[l];
    const int64_t out = divide_up(a.out, 4), in = l >= p.first ? divide_up(a.in + p.biased, 4) : 0;
    for (int64_t tiles : {out * in, divide_up<int64_t>(rows, 2) * out}) most = tiles > most ? tiles : most;
  }
  return most > 160 ? kInnerThreads : p.tasks > 4 * p.processors ? 64 : 128;
}

}  // namespace inner_layout

// Lays out a block's memory for shared memory of `limit` bytes: all of it there, or the rows, or nothing. Fewer query
// rows at a time are taken for it to fit, even twice. Returns the elements of states and rows.
inline int64_t lay_out(InnerLoop& p, bool backward, bool has_query, int64_t element, int64_t limit, bool& on_chip) {
  constexpr int kManyRows = 128;
  p.threads = inner_layout::threads_for(p);
  const bool together = p.loss == Loss::maximum_entropy;  // whose rows are no good one by one
  const int rows = has_query ? p.query.rows : 0, most = together ? 1 : divide_up(rows > 0 ? rows : 1, kManyRows);
  const auto fits = [&](bool states, int64_t bytes, int fewest) {
    for (int parts = most;; ++parts) {
      const int chunk = divide_up(rows, parts);
      if (parts > most && (together || chunk < fewest)) return false;
      const inner_layout::Sizes sizes = inner_layout::place(p, backward, has_query, chunk);
      if ((sizes.rows + (states ? sizes.states : 0)) * element <= bytes) return true;
    }
  };
  const int64_t half = limit / 2 - 1024;  // a block takes a little more than it asks for
  on_chip = fits(true, half, 32) || fits(true, limit, 16);
  p.rows_on_chip = on_chip || fits(false, half, 32) || fits(false, limit, 16);
  if (!p.rows_on_chip) inner_layout::place(p, backward, has_query, divide_up(rows, most));
  const inner_layout::Sizes sizes = inner_layout::place(p, backward, has_query, p.chunk);
  p.states_size = int(sizes.states);
  p.rows_size = int(sizes.rows);
  return sizes.states + sizes.rows;
}

}  // namespace fastmeta::cuda
