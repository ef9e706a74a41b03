// The way back through a task's steps: a product with the Hessian of each step's loss, by tangents of all activations
// and deltas in the adjoint's direction (Pearlmutter 1994).
#pragma once

#include "query.h"

namespace fastmeta::cuda {

template <class A, bool kChip>
struct InnerSweep : InnerQuery<A, kChip> {
  using Base = InnerQuery<A, kChip>;
  using Near = typename Base::Near;
  using Base::add_parts, Base::add_quad, Base::add_seen, Base::archive, Base::copy, Base::fill_zero, Base::first_of;
  using Base::gradient_term, Base::gram, Base::input_gradient, Base::input_of, Base::memory, Base::of_task;
  using Base::own_rate, Base::p, Base::rate, Base::set_part, Base::states, Base::target, Base::team;

  __device__ __forceinline__ InnerSweep(const InnerLoop& p, Near memory, Near states) : Base(p, memory, states) {}

  __device__ __forceinline__ void sweep() const {
    if (p.momentum != 0) fill_zero(states + p.moment_adjoint, p.state);
    for (int k = p.steps - 1; k >= 0; --k) {
      restore(k);
      __syncthreads();
      if (p.wants_rates) gradients_of_rates(k);
      if (!p.plain) {
        take_direction(k);
        __syncthreads();
      }
      if (p.curvature) hessian_product(k);
    }
  }

  // The weights and rows of step k.
  __device__ __forceinline__ void restore(int k) const {
    copy(archive() + p.kept_states + int64_t(k) * p.state, states + p.weights, p.state);
    if (k + 1 < p.steps)
      copy(archive() + p.kept_records + int64_t(k) * p.record_size, memory + p.record, p.record_size);
  }

  // direction = moment_adjoint - rate * adjoint; moment_adjoint = momentum * direction; adjoint += decay * direction
  __device__ __forceinline__ void take_direction(int step) const {
    const Near v = states + p.adjoint, r = states + p.direction, u = states + p.moment_adjoint;
    const A decay = A(p.weight_decay), keep = A(p.momentum);
    for (int l = 0; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const A layer_rate = rate(step, l);
      each(team, a.rows, a.ldw, [&](int row, int c) {
        const int i = a.at + row * a.ldw + c;
        const A own = p.elementwise && row >= a.out ? A(0) : own_rate(a, row, c);
        A all = -layer_rate * own * v[i];
        if (p.momentum != 0) {
          all += u[i];
          u[i] = keep * all;
        }
        r[i] = all;
        if (p.weight_decay != 0) v[i] += decay * all;
      });
    }
  }

  __device__ __forceinline__ void gradients_of_rates(int step) const {
    const Near v = states + p.adjoint, state = states + p.weights;
    const A* moment = p.keeps_moments ? archive() + p.kept_moments + int64_t(step) * p.state : nullptr;
    const A decay = A(p.weight_decay);
    for (int l = 0; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      A sum = 0;
      if (l < p.first) {
        const Near delta = memory + a.support.delta;
        each(team, p.support.rows, a.out, [&](int r, int c) {
          const int i = a.at + r * a.ldw + c;
          sum += v[i] * (moment ? moment[i] : delta[r * a.support.ld_delta + c]);
        });
      } else {
        const A layer_rate = rate(step, l);
        A* d_weight = a.d_weight_rate.data ? target(a.d_weight_rate) : nullptr;
        A* d_bias = a.d_bias_rate.data ? target(a.d_bias_rate) : nullptr;
        const auto add = [&](int r, int c, A m) {
          const int i = a.at + r * a.ldw + c;
          const A product = v[i] * m;
          sum += product * own_rate(a, r, c);
          A* to = c < a.in ? d_weight ? d_weight + r * a.in + c : nullptr : d_bias ? d_bias + r : nullptr;
          if (to) *to -= layer_rate * product;
        };
        if (moment)
          each(team, a.out, a.columns, [&](int r, int c) { add(r, c, moment[a.at + r * a.ldw + c]); });
        else
          sums_over_rows<A, kChip>(team, a.out, a.columns, p.support.rows, gradient_term(a, l), {},
                                   [&](int r, int c, const Quad<A>& g) {
#pragma unroll
                                     for (int j = 0; j < 4; ++j)
                                       if (c + j < a.columns)
                                         add(r, c + j, g.v[j] + decay * state[a.at + r * a.ldw + c + j]);
                                   });
      }
      set_part(l, sum);
    }
    const A sum = add_parts(p.layers);
    if (p.d_rates.data && team.id < p.layers) target(p.d_rates)[step * p.layers + team.id] -= sum;
  }

  // adjoint += Hessian times direction; gradients of the inputs on the way
  __device__ __forceinline__ void hessian_product(int step) const {
    const int rows = p.support.rows;
    const auto scale = [&](int l) { return p.plain ? -rate(step, l) : A(1); };
    for (int l = 0; l < p.layers; ++l) {
      dot_forward(l, scale(l));
      __syncthreads();
    }
    const InnerLayer& last = p.layer[p.layers - 1];
    if (p.loss == Loss::maximum_entropy)
      this->trajectories(p.support).times_curvature(&memory[p.curve], &memory[last.dot_delta], last.support.ld_delta,
                                                    whole(last.out));
    for (int r = team.id; r < rows && p.loss != Loss::maximum_entropy; r += team.threads) {
      const int i = r * last.support.ld_delta;
      times_curvature(p.loss, last.out, whole(last.out), of_task(p.support.weight, rows)[r], &memory[p.curve + i],
                      &memory[p.dot_logits + i]);
    }
    __syncthreads();
    for (int l = p.layers - 1; l > 0; --l) {
      dot_backward(l, scale(l));
      __syncthreads();
    }
    const InnerLayer& a = p.layer[0];
    const Near dot_delta = memory + a.dot_delta;
    A* d_x = p.d_support_x ? of_task(p.d_support_x, int64_t(rows) * (gram() ? a.out : a.in)) : nullptr;
    if (d_x && !gram()) {
      input_gradient(rows, {dot_delta, a.support.ld_delta}, {memory + a.support.delta, a.support.ld_delta}, scale(0),
                     d_x, true);
      __syncthreads();  // the direction may be the adjoint itself, changed below
    }
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& b = p.layer[l];
      const Near to = held(states + p.adjoint + b.at);
      Term<A, kChip> other{};
      if (l > 0) other = {memory + b.support.delta, b.support.ld_delta, memory + p.layer[l - 1].dot_value, b.ld_in};
      sums_over_rows<A, kChip>(team.turned(b.turn), b.out, b.columns, rows,
                               {memory + b.dot_delta, b.support.ld_delta, input_of(l), b.ld_in}, other,
                               [&](int r, int c, const Quad<A>& v) { add_quad(to + r * b.ldw + c, v); });
    }
    if (gram()) {
      add_seen(rows, memory + p.x, dot_delta, a.support.ld_delta);
      if (d_x)
        each(team, rows, a.out, [&](int r, int c) { d_x[r * a.out + c] += dot_delta[r * a.support.ld_delta + c]; });
      if (p.d_gram_support) {
        A* out = of_task(p.d_gram_support, int64_t(rows) * rows);
        rows_by_rows<A, kChip>(team, rows, rows, rows, a.out,
                               {dot_delta, a.support.ld_delta, first_of(p.weights), a.ldw}, {}, A(1),
                               [&](int r, int c, A v) {
                                 if (c < rows) out[r * rows + c] -= v;
                               });
      }
    }
    __syncthreads();
  }

  // Tangents of a layer's pre-activations, and through its activation.
  __device__ __forceinline__ void dot_forward(int l, A scale) const {
    const InnerLayer& a = p.layer[l];
    const bool hidden = l + 1 < p.layers, bent = hidden && is_curved(p.activation);
    const Near to = held(memory + (hidden ? a.dot_value : p.dot_logits));
    const Near slope = held(memory + a.support.slope), bend = memory + a.support.bend;
    const int ld = held(hidden ? p.layer[l + 1].ld_in : a.support.ld_delta), width = held(a.out);
    const auto put = [&](int r, int c, A z) {
      const int i = r * ld + c;
      if (hidden && c < width) {
        if (bent) bend[i] *= z;
        z *= slope_of(p.activation, A(slope[i]));
      }
      to[i] = c < width ? z : A(0);
    };
    if (l < p.first) {
      const Near seen = first_of(p.direction);
      each(team, p.support.rows, ld, [&](int r, int c) { put(r, c, c < a.out ? scale * seen[r * a.ldw + c] : A(0)); });
      return;
    }
    Term<A, kChip> through{};
    if (l > 0) through = {memory + p.layer[l - 1].dot_value, a.ld_in, states + p.weights + a.at, a.ldw};
    rows_by_rows<A, kChip>(team, p.support.rows, a.out, hidden ? a.out + p.biased : a.out, a.columns, through,
                           {input_of(l), a.ld_in, states + p.direction + a.at, a.ldw}, scale, put);
  }

  // Tangents of the deltas of the layer below.
  __device__ __forceinline__ void dot_backward(int l, A scale) const {
    const InnerLayer &a = p.layer[l], &below = p.layer[l - 1];
    const bool bent = is_curved(p.activation);
    rows_by_matrix<A, kChip>(team, p.support.rows, a.in, a.out,
                             {memory + a.dot_delta, a.support.ld_delta, states + p.weights + a.at, a.ldw},
                             {memory + a.support.delta, a.support.ld_delta, states + p.direction + a.at, a.ldw}, scale,
                             [&](int r, int c, const Quad<A>& v) {
                               const int i = r * a.ld_in + c;
                               const Quad<A> kept = quad(memory + below.support.slope + i);
                               Quad<A> extra{};
                               if (bent) extra = quad(memory + below.support.bend + i);
                               Quad<A> d;
#pragma unroll
                               for (int j = 0; j < 4; ++j)
                                 d.v[j] = c + j < a.in ? v.v[j] * slope_of(p.activation, kept.v[j]) + extra.v[j] : A(0);
                               put_quad(memory + below.dot_delta + r * below.support.ld_delta + c, d);
                             });
  }
};

}  // namespace fastmeta::cuda
