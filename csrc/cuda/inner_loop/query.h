// The query rows of a task: loss and logits at the adapted weights, or all that goes back from there.
#pragma once

#include "block.h"

namespace fastmeta::cuda {

template <class A, bool kChip>
struct InnerQuery : InnerBlock<A, kChip> {
  using Base = InnerBlock<A, kChip>;
  using Near = typename Base::Near;
  using Base::add_parts, Base::fill_zero, Base::forward, Base::gram, Base::losses, Base::memory, Base::of_task, Base::p;
  using Base::set_part, Base::states, Base::take_input, Base::team;

  __device__ __forceinline__ InnerQuery(const InnerLoop& p, Near memory, Near states) : Base(p, memory, states) {}

  __device__ __forceinline__ Near first_of(int state) const { return states + state + p.first_state; }

  __device__ __forceinline__ void give_logits(int begin, int count) const {
    const InnerLayer& last = p.layer[p.layers - 1];
    A* out = of_task(p.logits, int64_t(p.query.rows) * last.out) + int64_t(begin) * last.out;
    each(team, count, last.out,
         [&](int r, int c) { out[r * last.out + c] = memory[last.query.delta + r * last.query.ld_delta + c]; });
  }
  // From each thread's part.
  __device__ __forceinline__ void give_loss(A part) const {
    set_part(0, part);
    const A total = add_parts(1);
    if (team.id == 0) *of_task(p.losses, 1) = total;
  }

  __device__ __forceinline__ void query_forward() const {
    A total = 0;
    for (int begin = 0; begin < p.query.rows; begin += p.chunk) {
      const int count = smaller(p.chunk, p.query.rows - begin);
      take_input(p.query, begin, count, memory + p.query_x, p.ld_query_x);
      __syncthreads();
      forward(p.query, begin, count, memory + p.query_x, p.ld_query_x, true, false);
      total += losses(p.query, begin, count, true, false, A(1), nullptr, nullptr);
      give_logits(begin, count);
      __syncthreads();
    }
    give_loss(total);
  }

  // The query rows' gradients of everything: of the adapted weights to `adjoint`.
  __device__ __forceinline__ void query_backward() const {
    const int classes = p.layer[p.layers - 1].out, last = p.layers - 1;
    const bool gives = p.grad_losses.data;
    const A scale = gives ? *of_task(p.grad_losses) : *of_task(static_cast<const void*>(p.losses), 1);
    const A* extra = gives ? nullptr : of_task(static_cast<const void*>(p.logits), int64_t(p.query.rows) * classes);
    A total = 0;
    fill_zero(states + p.adjoint, p.state);
    for (int begin = 0; begin < p.query.rows; begin += p.chunk) {
      const int count = smaller(p.chunk, p.query.rows - begin);
      take_input(p.query, begin, count, memory + p.query_x, p.ld_query_x);
      __syncthreads();
      forward(p.query, begin, count, memory + p.query_x, p.ld_query_x, true, false);
      if (gives) {
        give_logits(begin, count);
        __syncthreads();  // their gradients take their place
      }
      total += losses(p.query, begin, count, true, true, scale, nullptr,
                      extra ? extra + int64_t(begin) * classes : nullptr);
      __syncthreads();
      for (int l = last; l >= p.first; --l) {
        query_layer_gradient(l, count);
        __syncthreads();  // deltas take the place of what was multiplied
        if (l > 0)
          query_deltas(l, count);
        else if (p.d_query_x)
          input_gradient(count, {memory + p.layer[0].query.delta, p.layer[0].query.ld_delta}, {}, A(1),
                         of_task(p.d_query_x, int64_t(p.query.rows) * p.layer[0].in) + int64_t(begin) * p.layer[0].in,
                         false);
        __syncthreads();
      }
      if (gram()) query_gram(begin, count);
      __syncthreads();
    }
    if (gives) give_loss(total);
  }

  __device__ __forceinline__ void query_layer_gradient(int l, int count) const {
    const InnerLayer& a = p.layer[l];
    const Near input = memory + (l == 0 ? p.query_x : p.layer[l - 1].query.value);
    const Near to = held(states + p.adjoint + a.at);
    sums_over_rows<A, kChip>(team, a.out, a.columns, count, {memory + a.query.delta, a.query.ld_delta, input, a.ld_in},
                             {}, [&](int r, int c, const Quad<A>& v) { add_quad(to + r * a.ldw + c, v); });
  }

  __device__ __forceinline__ void query_deltas(int l, int count) const {
    const InnerLayer& a = p.layer[l];
    const InnerPlaces& below = p.layer[l - 1].query;
    rows_by_matrix<A, kChip>(team, count, a.in, a.out,
                             {memory + a.query.delta, a.query.ld_delta, states + p.weights + a.at, a.ldw}, {}, A(1),
                             [&](int r, int c, const Quad<A>& v) {
                               const int i = r * a.ld_in + c;
                               const Quad<A> kept = quad(memory + below.slope + i);
                               Quad<A> d;
#pragma unroll
                               for (int j = 0; j < 4; ++j)
                                 d.v[j] = c + j < a.in ? v.v[j] * slope_of(p.activation, kept.v[j]) : A(0);
                               put_quad(memory + below.delta + i, d);
                             });
  }

  // Gram form: gradients of what stands for the first layer.
  __device__ __forceinline__ void query_gram(int begin, int count) const {
    const InnerLayer& a = p.layer[0];
    const int s = p.support.rows;
    const Near delta = memory + a.query.delta;
    if (p.d_query_x) {
      A* out = of_task(p.d_query_x, int64_t(p.query.rows) * a.out) + int64_t(begin) * a.out;
      each(team, count, a.out, [&](int r, int c) { out[r * a.out + c] = delta[r * a.query.ld_delta + c]; });
    }
    if (p.d_gram_query) {
      A* out = of_task(p.d_gram_query, int64_t(p.query.rows) * s) + int64_t(begin) * s;
      rows_by_rows<A, kChip>(team, count, s, s, a.out, {delta, a.query.ld_delta, first_of(p.weights), a.ldw}, {}, A(1),
                             [&](int r, int c, A v) {
                               if (c < s) out[r * s + c] = -v;
                             });
    }
    add_seen(count, memory + p.query_x, delta, a.query.ld_delta);
  }
  // The first layer's adjoint as what the support rows see of it.
  __device__ __forceinline__ void add_seen(int count, Near gram_rows, Near delta, int ld) const {
    const InnerLayer& a = p.layer[0];
    const Near to = first_of(p.adjoint);
    sums_over_rows<A, kChip>(team, p.support.rows, a.out, count, {gram_rows, p.ldx, delta, ld}, {},
                             [&](int r, int c, const Quad<A>& v) { add_quad(to + r * a.ldw + c, v); });
  }

  template <class To>
  __device__ __forceinline__ static void add_quad(To to, const Quad<A>& v) {
    Quad<A> sum = quad(to);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.v[j] += v.v[j];
    put_quad(to, sum);
  }

  // Rows' gradient with respect to the first layer's input [count, in], dense form: `deltas` times the weights, plus
  // `scale` times `others` times the direction.
  struct Deltas {
    Near rows;
    int ld = 0;
  };
  __device__ __forceinline__ void input_gradient(int count, Deltas deltas, Deltas others, A scale, A* out,
                                                 bool add) const {
    const InnerLayer& a = p.layer[0];
    Term<A, kChip> second{};
    if (others.ld) second = {others.rows, others.ld, states + p.direction + a.at, a.ldw};
    rows_by_matrix<A, kChip>(team, count, a.in, a.out, {deltas.rows, deltas.ld, states + p.weights + a.at, a.ldw},
                             second, scale, [&](int r, int c, const Quad<A>& v) {
                               A* to = out + int64_t(r) * a.in + c;
#pragma unroll
                               for (int j = 0; j < 4; ++j)
                                 if (c + j < a.in) to[j] = add ? to[j] + v.v[j] : v.v[j];
                             });
  }
};

}  // namespace fastmeta::cuda
