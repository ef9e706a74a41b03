// A block's memory for the task it has in hand, and the task's steps forward in time.
//
// A *state* is all weights of one moment, each layer with its biases in the column behind its weights (rows have a one
// there), then the first layer's coefficients in the Gram form. Moments and adjoints are laid out likewise. States, and
// the rows of one step, lie in the block's shared memory, or in its part of the scratch where that is too small.
#pragma once

#include "layout.h"
#include "paths.h"
#include "rows.h"

namespace fastmeta::cuda {

template <class A, bool kChip>
struct InnerBlock {
  using Near = Field<A, kChip>;

  const InnerLoop& p;
  const Near memory;  // rows
  const Near states;
  const Team team;
  int task = 0;

  __device__ __forceinline__ InnerBlock(const InnerLoop& p, Near memory, Near states)
      : p(p), memory(memory), states(states), team(rotated(p)) {}

  // States and rows of earlier steps, in the scratch.
  __device__ __forceinline__ A* archive() const { return static_cast<A*>(p.scratch) + p.block_scratch * blockIdx.x; }

  // Where a product has work for few of a block's warps, those of the blocks on one multiprocessor are not the same.
  __device__ __forceinline__ static Team rotated(const InnerLoop& p) {
    const int id = int(threadIdx.x) + 32 * int(blockIdx.x / unsigned(p.processors) % unsigned(p.threads / 32));
    return {id < p.threads ? id : id - p.threads, p.threads};
  }

  __device__ __forceinline__ const A* of_task(const InnerInput& i) const {
    return static_cast<const A*>(i.data) + i.task * task;
  }
  // `size` elements of each task
  __device__ __forceinline__ const A* of_task(const void* data, int64_t size) const {
    return static_cast<const A*>(data) + size * task;
  }
  __device__ __forceinline__ A* of_task(void* data, int64_t size) const { return static_cast<A*>(data) + size * task; }
  // Sums over tasks are formed by each block for its own tasks first.
  __device__ __forceinline__ A* target(const InnerOutput& o) const {
    return static_cast<A*>(o.data) + (o.task ? o.task * task : p.partials * blockIdx.x);
  }
  __device__ __forceinline__ bool adds(const InnerOutput& o) const { return o.task == 0 && task != int(blockIdx.x); }

  __device__ __forceinline__ bool gram() const { return p.first > 0; }
  __device__ __forceinline__ bool relu() const { return p.activation == Activation::relu; }
  __device__ __forceinline__ A rate(int step, int l) const { return of_task(p.rates)[step * p.layers + l]; }
  // A weight's own factor of its rate.
  __device__ __forceinline__ A own_rate(const InnerLayer& a, int row, int column) const {
    if (!p.elementwise) return A(1);
    if (column < a.in) return of_task(a.weight_rate)[row * a.in + column];
    return column < a.columns ? of_task(a.bias_rate)[row] : A(0);
  }

  __device__ __forceinline__ void fill_zero(Near to, int count) const {
    each_quad(team, count, [&](int i) { put_quad(to + i, Quad<A>{}); });
  }
  template <class From, class To>
  __device__ __forceinline__ void copy(From from, To to, int count) const {
    each_quad(team, count, [&](int i) { put_quad(to + i, quad(from + i)); });
  }

  // Rows [rows, columns] of far memory to `all` rows of `ld`: behind the last column `after(row)`, else zeros.
  template <class After>
  __device__ __forceinline__ void take(const A* from, int rows, int columns, Near to, int all, int ld,
                                       const After& after) const {
    const bool aligned = columns % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Quad<A>) == 0;
    const int quads = aligned ? columns / 4 : 0;
    each_fetched<4, Quad<A>>(
        team, all, quads,
        [&](int r, int q) { return r < rows ? quad(from + int64_t(r) * columns + 4 * q) : Quad<A>{}; },
        [&](int r, int q, const Quad<A>& v) { put_quad(to + r * ld + 4 * q, v); });
    each_fetched<2, Quad<A>>(
        team, all, ld / 4 - quads,
        [&](int r, int q) {
          const int c = 4 * (quads + q);
          Quad<A> v{};
          if (r < rows) {
            const A* row = from + int64_t(r) * columns + c;
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (c + j < columns) v.v[j] = row[j];
            const A last = after(r);
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (c + j == columns) v.v[j] = last;
          }
          return v;
        },
        [&](int r, int q, const Quad<A>& v) { put_quad(to + r * ld + 4 * (quads + q), v); });
  }

  // Weights [out, in] and biases [out] in far memory, to where the layer is in `state`.
  __device__ __forceinline__ void take_layer(const InnerLayer& a, const A* weight, const A* bias, Near state) const {
    take(weight, a.out, a.in, state + a.at, a.rows, a.ldw, [&](int r) { return p.biased ? bias[r] : A(0); });
  }
  __device__ __forceinline__ void give_layer(const InnerLayer& a, Near state, A* weight, A* bias) const {
    each(team, a.out, a.columns, [&](int r, int c) {
      A* to = c < a.in ? weight ? weight + r * a.in + c : nullptr : bias ? bias + r : nullptr;
      if (to) *to = state[a.at + r * a.ldw + c];
    });
  }

  // The weights that the task starts from.
  __device__ __forceinline__ void take_weights() const {
    const Near state = states + p.weights;
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      take_layer(a, of_task(a.weight), of_task(a.bias), state);
    }
    fill_zero(state + p.first_state, p.state - p.first_state);
  }

  // The first layer's input, or inner products with the support rows.
  __device__ __forceinline__ void take_input(const InnerRows& rows, int begin, int count, Near to, int ld) const {
    const int s = p.support.rows, in = p.layer[0].in;
    if (gram())
      take(of_task(rows.gram, int64_t(rows.rows) * s) + int64_t(begin) * s, count, s, to, count, ld,
           [](int) { return A(0); });
    else
      take(of_task(rows.x, int64_t(rows.rows) * in) + int64_t(begin) * in, count, in, to, count, ld,
           [&](int) { return A(p.biased); });
  }

  // ---- the net ------------------------------------------------------------------------------------------------------

  // Pre-activations of rows, `places.delta` of the last layer: the logits. The block must wait before and has waited
  // after. x: what `take_input` left; `second`: keep second derivatives too.
  __device__ __forceinline__ void forward(const InnerRows& rows, int begin, int count, Near x, int ldx, bool query,
                                          bool second) const {
    const Near state = states + p.weights;
    for (int l = 0; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const InnerPlaces& to = query ? a.query : a.support;
      const bool hidden = l + 1 < p.layers;
      const Near out = held(memory + (hidden ? to.value : to.delta));
      const int ld = held(hidden ? p.layer[l + 1].ld_in : to.ld_delta), width = held(a.out);
      const int written = hidden ? width + p.biased : width;
      const A least = hidden && relu() ? A(0) : -A(INFINITY), behind = hidden ? A(p.biased) : A(0);
      const auto put = [&](int r, int c, A z) {
        z = z < least ? least : z;  // NaN stays
        // behind the last column the one that biases are multiplied by
        out[r * ld + c] = c < width ? z : c == width ? behind : A(0);
      };
      if (l < p.first) {
        const A* given = of_task(rows.x, int64_t(rows.rows) * a.out) + int64_t(begin) * a.out;
        rows_by_matrix<A, kChip>(team, count, written, p.support.rows, {x, ldx, state + p.first_state, a.ldw}, {}, A(1),
                                 [&](int r, int c, const Quad<A>& v) {
#pragma unroll
                                   for (int j = 0; j < 4; ++j)
                                     put(r, c + j, c + j < a.out ? given[r * a.out + c + j] - v.v[j] : A(0));
                                 });
      } else {
        const Near input = l == 0 ? x : memory + (query ? p.layer[l - 1].query : p.layer[l - 1].support).value;
        rows_by_rows<A, kChip>(team, count, a.out, written, a.columns, {input, a.ld_in, state + a.at, a.ldw}, {}, A(1),
                               put);
      }
      __syncthreads();
      if (!hidden || !is_curved(p.activation)) continue;
      each(team, count, a.out, [&](int r, int c) {
        const Curve<A> curve = curve_at(p.activation, A(out[r * ld + c]));
        out[r * ld + c] = curve.value;
        memory[to.slope + r * ld + c] = curve.slope;
        if (second) memory[to.bend + r * ld + c] = curve.bend;
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ Trajectories<A> trajectories(const InnerRows& rows) const {
    return {team, rows, task, &memory[p.path_room]};
  }

  // Losses of rows from the logits at `p.layer[last].delta`; with `gradient` the logits' gradients take their place.
  // Returns this thread's part of the sum.
  __device__ __forceinline__ A losses(const InnerRows& rows, int begin, int count, bool query, bool gradient, A scale,
                                      A* curve, const A* extra) const {
    const InnerLayer& a = p.layer[p.layers - 1];
    const InnerPlaces& to = query ? a.query : a.support;
    if (p.loss == Loss::maximum_entropy)
      return trajectories(rows).loss(&memory[to.delta], to.ld_delta, whole(a.out), gradient, scale, curve, extra);
    const int64_t start = int64_t(task) * rows.rows + begin;
    A total = 0;
    for (int r = team.id; r < count; r += team.threads) {
      A* logits = &memory[to.delta + r * to.ld_delta];
      LossRow<A> row{};
      row.classes = a.out;
      row.padded = whole(a.out);
      row.weight = static_cast<const A*>(rows.weight)[start + r];
      row.scale = scale;
      row.huber = A(p.delta);
      if (p.loss == Loss::cross_entropy)
        row.label = rows.labels[start + r];
      else
        row.target = static_cast<const A*>(rows.target) + (start + r) * a.out;
      row.delta = gradient ? logits : nullptr;
      row.curve = curve ? curve + r * to.ld_delta : nullptr;
      row.extra = extra ? extra + int64_t(r) * a.out : nullptr;
      total += loss_row(p.loss, row, logits);
    }
    return total;
  }

  // Deltas of all hidden layers from those of the last; `bend` becomes its product with what comes in.
  __device__ __forceinline__ void support_deltas(bool second) const {
    const bool bent = second && is_curved(p.activation);
    for (int l = p.layers - 1; l > 0; --l) {
      const InnerLayer &a = p.layer[l], &below = p.layer[l - 1];
      const Near delta = held(memory + below.support.delta), slope = held(memory + below.support.slope);
      const Near bend = memory + below.support.bend;
      rows_by_matrix<A, kChip>(team, p.support.rows, a.in, a.out,
                               {memory + a.support.delta, a.support.ld_delta, states + p.weights + a.at, a.ldw}, {},
                               A(1), [&](int r, int c, const Quad<A>& v) {
                                 const Quad<A> kept = quad(slope + r * a.ld_in + c);
                                 Quad<A> d;
#pragma unroll
                                 for (int j = 0; j < 4; ++j)
                                   d.v[j] = c + j < a.in ? v.v[j] * slope_of(p.activation, kept.v[j]) : A(0);
                                 put_quad(delta + r * below.support.ld_delta + c, d);
                                 if (!bent) return;
                                 Quad<A> b = quad(bend + r * a.ld_in + c);
#pragma unroll
                                 for (int j = 0; j < 4; ++j) b.v[j] *= v.v[j];
                                 put_quad(bend + r * a.ld_in + c, b);
                               });
      __syncthreads();
    }
  }

  __device__ __forceinline__ Near input_of(int l) const {
    return memory + (l == 0 ? p.x : p.layer[l - 1].support.value);
  }
  // What a gradient of the support loss at a layer is made of.
  __device__ __forceinline__ Term<A, kChip> gradient_term(const InnerLayer& a, int l) const {
    return {memory + a.support.delta, a.support.ld_delta, input_of(l), a.ld_in};
  }

  // W' = W - rate * M', M' = momentum * M + gradient + weight_decay * W
  __device__ __forceinline__ void update(int step) const {
    const Near state = states + p.weights, moment = states + p.moment;
    const A decay = A(p.weight_decay), keep = A(step > 0 ? p.momentum : 0);
    A* kept = p.keeps_moments ? archive() + p.kept_moments + int64_t(step) * p.state : nullptr;
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const A layer_rate = rate(step, l);
      sums_over_rows<A, kChip>(team.turned(a.turn), a.out, a.columns, p.support.rows, gradient_term(a, l), {},
                               [&](int r, int c, Quad<A> g) {
                                 const int i = a.at + r * a.ldw + c;
                                 Quad<A> w = quad(state + i);
                                 if (p.plain) {
#pragma unroll
                                   for (int j = 0; j < 4; ++j) w.v[j] -= layer_rate * g.v[j];
                                   return put_quad(state + i, w);
                                 }
                                 if (p.momentum != 0) {
                                   const Quad<A> m = quad(moment + i);
#pragma unroll
                                   for (int j = 0; j < 4; ++j) g.v[j] += keep != A(0) ? keep * m.v[j] : A(0);
                                 }
#pragma unroll
                                 for (int j = 0; j < 4; ++j) {
                                   g.v[j] += decay * w.v[j];
                                   w.v[j] -= layer_rate * own_rate(a, r, c + j) * g.v[j];
                                 }
                                 put_quad(state + i, w);
                                 if (p.momentum == 0) return;
                                 put_quad(moment + i, g);
                                 if (kept) put_quad(kept + i, g);
                               });
    }
    if (gram()) {
      const InnerLayer& a = p.layer[0];
      const A layer_rate = rate(step, 0);
      each(team, p.support.rows, a.out, [&](int r, int c) {
        const int i = p.first_state + r * a.ldw + c;
        A m = memory[a.support.delta + r * a.support.ld_delta + c];
        if (p.momentum != 0) {
          if (step > 0) m += keep * moment[i];
          moment[i] = m;
          if (kept) kept[i] = m;
        }
        state[i] += layer_rate * m;
      });
    }
  }

  // All steps. With `keep`, what the way back needs of all but the last step goes to the archive; the last step's rows
  // stay where they are.
  __device__ __forceinline__ void adapt(bool keep) const {
    for (int k = 0; k < p.steps; ++k) {
      const bool archived = keep && k + 1 < p.steps;
      if (keep) copy(states + p.weights, archive() + p.kept_states + int64_t(k) * p.state, p.state);
      forward(p.support, 0, p.support.rows, memory + p.x, p.ldx, false, keep && p.curvature);
      A* curve = keep && p.curvature ? &memory[p.curve] : nullptr;
      losses(p.support, 0, p.support.rows, false, true, A(1), curve, nullptr);
      __syncthreads();
      support_deltas(keep && p.curvature);
      if (archived)
        copy(memory + p.record, archive() + p.kept_records + int64_t(k) * p.record_size, p.record_size);
      update(k);
      __syncthreads();
    }
  }

  // ---- sums over the block ------------------------------------------------------------------------------------------

  static constexpr int kParts = 8;

  __device__ __forceinline__ void set_part(int number, A part) const {
    memory[p.sums + number * team.threads + team.id] = part;
  }
  // Of all threads' parts of sum `number`, to the thread of that number, for numbers below `count`.
  __device__ __forceinline__ A add_parts(int count) const {
    const int each = team.threads / kParts;
    const Near parts = memory + p.sums + count * team.threads;
    __syncthreads();
    for (int part = team.id; part < kParts * count; part += team.threads) {
      const Near from = memory + p.sums + part * each;
      A sum = 0;
      for (int i = 0; i < each; ++i) sum += from[i];
      parts[part] = sum;
    }
    __syncthreads();
    A sum = 0;
    if (team.id < count)
      for (int i = 0; i < kParts; ++i) sum += parts[team.id * kParts + i];
    __syncthreads();
    return sum;
  }
};

}  // namespace fastmeta::cuda
