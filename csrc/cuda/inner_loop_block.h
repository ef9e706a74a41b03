// A block's memory for the task it has in hand, and the task's steps forward in time.
//
// A *state* is all weights of one moment, each layer with its biases in the column behind its weights (rows have a one
// there), then the first layer's coefficients in the Gram form. Moments and adjoints are laid out likewise. States, and
// the rows of one step, lie in the block's shared memory, or in its part of the scratch where that is too small.
#pragma once

#include "inner_loop_layout.h"
#include "inner_loop_paths.h"
#include "inner_loop_rows.h"

namespace fastmeta::cuda {

template <class A>
struct InnerBlock {
  const InnerLoop& p;
  A* const memory;   // rows
  A* const states;
  const Team team;
  int task = 0;

  __device__ __forceinline__ InnerBlock(const InnerLoop& p, A* memory, A* states)
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

  __device__ __forceinline__ void fill_zero(A* to, int count) const {
    each_quad(team, count, [&](int i) { put_quad(to + i, Quad<A>{}); });
  }
  __device__ __forceinline__ void copy(const A* from, A* to, int count) const {
    each_quad(team, count, [&](int i) { put_quad(to + i, quad(from + i)); });
  }

  // Weights [out, in] and biases [out] in far memory, to where the layer is in `state`.
  __device__ __forceinline__ void take_layer(const InnerLayer& a, const A* weight, const A* bias, A* state) const {
    each_fetched<A>(
        team, whole(a.out), a.ldw,
        [&](int r, int c) {
          if (r >= a.out || c >= a.columns) return A(0);
          return c < a.in ? weight[r * a.in + c] : bias[r];
        },
        [&](int r, int c, A v) { state[a.at + r * a.ldw + c] = v; });
  }
  __device__ __forceinline__ void give_layer(const InnerLayer& a, const A* state, A* weight, bool add_weight, A* bias,
                                             bool add_bias) const {
    each(team, a.out, a.columns, [&](int r, int c) {
      A* to = c < a.in ? weight ? weight + r * a.in + c : nullptr : bias ? bias + r : nullptr;
      if (!to) return;
      const A v = state[a.at + r * a.ldw + c];
      *to = (c < a.in ? add_weight : add_bias) ? *to + v : v;
    });
  }

  // The weights that the task starts from.
  __device__ __forceinline__ void take_weights() const {
    A* state = states + p.weights;
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      take_layer(a, of_task(a.weight), of_task(a.bias), state);
    }
    fill_zero(state + p.first_state, p.state - p.first_state);
  }

  // Rows [rows, columns] of far memory, to rows of `ld`: behind the last column `after`, then zeros.
  __device__ __forceinline__ void take_rows(const A* from, int rows, int columns, A after, A* to, int ld) const {
    each_fetched<A>(
        team, rows, ld, [&](int r, int c) { return c < columns ? from[r * columns + c] : c == columns ? after : A(0); },
        [&](int r, int c, A v) { to[r * ld + c] = v; });
  }
  // The first layer's input, or inner products with the support rows.
  __device__ __forceinline__ void take_input(const InnerRows& rows, int begin, int count, A* to, int ld) const {
    const int s = p.support.rows, in = p.layer[0].in;
    if (gram())
      take_rows(of_task(rows.gram, int64_t(rows.rows) * s) + int64_t(begin) * s, count, s, A(0), to, ld);
    else
      take_rows(of_task(rows.x, int64_t(rows.rows) * in) + int64_t(begin) * in, count, in, A(p.biased), to, ld);
  }

  // ---- the net ------------------------------------------------------------------------------------------------------

  // Pre-activations of rows, `places.delta` of the last layer: the logits. The block must wait before and has waited
  // after. x: what `take_input` left; `second`: keep second derivatives too.
  __device__ __forceinline__ void forward(const InnerRows& rows, int begin, int count, const A* x, int ldx, bool query,
                                          bool second) const {
    const A* state = states + p.weights;
    for (int l = 0; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const InnerPlaces& to = query ? a.query : a.support;
      const bool hidden = l + 1 < p.layers;
      A* out = memory + (hidden ? to.value : to.delta);
      const int ld = hidden ? p.layer[l + 1].ld_in : to.ld_delta;
      const int written = hidden ? a.out + p.biased : a.out;
      const auto put = [&](int r, int c, A z) {
        // behind the last column the one that biases are multiplied by
        if (c >= a.out)
          z = hidden && c == a.out ? A(p.biased) : A(0);
        else if (hidden && relu())
          z = z < 0 ? A(0) : z;
        out[r * ld + c] = z;
      };
      if (l < p.first) {
        const A* given = of_task(rows.x, int64_t(rows.rows) * a.out) + int64_t(begin) * a.out;
        rows_by_matrix<A>(team, count, written, p.support.rows, {x, ldx, state + p.first_state, a.ldw}, {}, A(1),
                          [&](int r, int c, const Quad<A>& v) {
#pragma unroll
                            for (int j = 0; j < 4; ++j)
                              put(r, c + j, c + j < a.out ? given[r * a.out + c + j] - v.v[j] : A(0));
                          });
      } else {
        const A* input = l == 0 ? x : memory + (query ? p.layer[l - 1].query : p.layer[l - 1].support).value;
        rows_by_rows<A>(team, count, a.out, written, a.columns, {input, a.ld_in, state + a.at, a.ldw}, {}, A(1), put);
      }
      __syncthreads();
      if (!hidden || !is_curved(p.activation)) continue;
      each(team, count, a.out, [&](int r, int c) {
        const Curve<A> curve = curve_at(p.activation, out[r * ld + c]);
        out[r * ld + c] = curve.value;
        memory[to.slope + r * ld + c] = curve.slope;
        if (second) memory[to.bend + r * ld + c] = curve.bend;
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ Trajectories<A> trajectories(const InnerRows& rows) const {
    return {team, rows, task, memory + p.path_room};
  }

  // Losses of rows from the logits at `p.layer[last].delta`; with `gradient` the logits' gradients take their place.
  // Returns this thread's part of the sum.
  __device__ __forceinline__ A losses(const InnerRows& rows, int begin, int count, bool query, bool gradient, A scale,
                                      A* curve, const A* extra) const {
    const InnerLayer& a = p.layer[p.layers - 1];
    const InnerPlaces& to = query ? a.query : a.support;
    if (p.loss == Loss::maximum_entropy)
      return trajectories(rows).loss(memory + to.delta, to.ld_delta, whole(a.out), gradient, scale, curve, extra);
    const int64_t start = int64_t(task) * rows.rows + begin;
    A total = 0;
    for (int r = team.id; r < count; r += team.threads) {
      A* logits = memory + to.delta + r * to.ld_delta;
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
      A* delta = memory + below.support.delta;
      const A* slope = memory + below.support.slope;
      A* bend = memory + below.support.bend;
      rows_by_matrix<A>(team, p.support.rows, a.in, a.out,
                        {memory + a.support.delta, a.support.ld_delta, states + p.weights + a.at, a.ldw}, {}, A(1),
                        [&](int r, int c, const Quad<A>& v) {
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

  __device__ __forceinline__ const A* input_of(int l) const {
    return memory + (l == 0 ? p.x : p.layer[l - 1].support.value);
  }
  // What a gradient of the support loss at a layer is made of.
  __device__ __forceinline__ Term<A> gradient_term(const InnerLayer& a, int l) const {
    return {memory + a.support.delta, a.support.ld_delta, input_of(l), a.ld_in};
  }

  // W' = W - rate * M', M' = momentum * M + gradient + weight_decay * W
  __device__ __forceinline__ void update(int step) const {
    A *state = states + p.weights, *moment = states + p.moment;
    const A decay = A(p.weight_decay), keep = A(step > 0 ? p.momentum : 0);
    A* kept = p.keeps_moments ? archive() + p.kept_moments + int64_t(step) * p.state : nullptr;
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const A layer_rate = rate(step, l);
      sums_over_rows<A>(team, a.out, a.columns, p.support.rows, gradient_term(a, l), {},
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
      if (keep && k > 0) copy(states + p.weights, archive() + p.kept_states + int64_t(k - 1) * p.state, p.state);
      forward(p.support, 0, p.support.rows, memory + p.x, p.ldx, false, keep && p.curvature);
      A* curve = keep && p.curvature ? memory + p.curve : nullptr;
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
    A* parts = memory + p.sums + count * team.threads;
    __syncthreads();
    if (team.id < kParts * count) {
      const A* from = memory + p.sums + team.id * each;
      A sum = 0;
      for (int i = 0; i < each; ++i) sum += from[i];
      parts[team.id] = sum;
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
