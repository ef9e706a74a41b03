// A task from start to end: what it starts from, and what it leaves behind.
#pragma once

#include "sweep.h"

namespace fastmeta::cuda {

template <class A, bool kChip>
struct InnerTask : InnerSweep<A, kChip> {
  using Base = InnerSweep<A, kChip>;
  using Near = typename Base::Near;
  using Base::add_quad, Base::adds, Base::copy, Base::first_of, Base::gram, Base::memory, Base::of_task, Base::p;
  using Base::states, Base::take_input, Base::target, Base::task, Base::team;

  __device__ __forceinline__ InnerTask(const InnerLoop& p, Near memory, Near states) : Base(p, memory, states) {}

  // Asks for what only comes to use later, to have it near by then.
  __device__ __forceinline__ void fetch(const void* data, int64_t size, int64_t element) const {
#ifndef FASTMETA_HOST
    const char* from = static_cast<const char*>(data) + size * element * task;
    for (int64_t i = 128 * team.id; i < size * element; i += 128 * team.threads)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(from + i));
#endif
  }
  __device__ __forceinline__ void fetch_rows(const InnerRows& rows, bool x) const {
    const InnerLayer& last = p.layer[p.layers - 1];
    fetch(rows.weight, rows.rows, sizeof(A));
    if (p.loss == Loss::cross_entropy)
      fetch(rows.labels, rows.rows, sizeof(int64_t));
    else if (p.loss != Loss::maximum_entropy)
      fetch(rows.target, int64_t(rows.rows) * last.out, sizeof(A));
    if (x && !gram()) fetch(rows.x, int64_t(rows.rows) * p.layer[0].in, sizeof(A));
  }

  __device__ __forceinline__ void start() const {
    fetch_rows(p.support, false);
    if (p.query.rows) fetch_rows(p.query, true);
    this->take_weights();
    take_input(p.support, 0, p.support.rows, memory + p.x, p.ldx);
  }

  __device__ __forceinline__ void give_adapted() const {
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      this->give_layer(a, states + p.weights, of_task(a.fast_weight, int64_t(a.out) * a.in),
                       p.biased ? of_task(a.fast_bias, a.out) : nullptr);
    }
    if (!gram()) return;
    const InnerLayer& a = p.layer[0];
    A* out = of_task(p.coefficients, int64_t(p.support.rows) * a.out);
    each(team, p.support.rows, a.out,
         [&](int r, int c) { out[r * a.out + c] = first_of(p.weights)[r * a.ldw + c]; });
  }
  // The incoming gradients of adapted weights and coefficients.
  __device__ __forceinline__ void take_gradients() const {
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      const void *weight = a.fast_weight, *bias = a.fast_bias;
      this->take_layer(a, of_task(weight, int64_t(a.out) * a.in), p.biased ? of_task(bias, a.out) : nullptr,
                       states + p.adjoint);
    }
    if (!gram()) return;
    const InnerLayer& a = p.layer[0];
    const void* given = p.coefficients;
    const A* from = of_task(given, int64_t(p.support.rows) * a.out);
    each(team, whole(p.support.rows), a.ldw, [&](int r, int c) {
      first_of(p.adjoint)[r * a.ldw + c] = r < p.support.rows && c < a.out ? -from[r * a.out + c] : A(0);
    });
  }

  // Outputs that are added to step by step.
  __device__ __forceinline__ void start_gradients() const {
    const int rows = p.support.rows;
    const auto clear = [&](A* to, int64_t count) {
      for (int64_t i = team.id; i < count; i += team.threads) to[i] = A(0);
    };
    const auto clear_sum = [&](const InnerOutput& o, int64_t count) {
      if (o.data && !adds(o)) clear(target(o), count);
    };
    if (p.d_support_x) {
      const int64_t count = int64_t(rows) * (gram() ? p.layer[0].out : p.layer[0].in);
      clear(of_task(p.d_support_x, count), count);
    }
    if (p.d_gram_support) clear(of_task(p.d_gram_support, int64_t(rows) * rows), int64_t(rows) * rows);
    clear_sum(p.d_rates, int64_t(p.steps) * p.layers);
    if (!p.elementwise) return;
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      clear_sum(a.d_weight_rate, int64_t(a.out) * a.in);
      clear_sum(a.d_bias_rate, a.out);
    }
  }
  __device__ __forceinline__ void finish_gradients() const {
    if (p.weight_sums) {
      A* sums = static_cast<A*>(p.weight_sums) + p.partials * blockIdx.x;
      if (task == int(blockIdx.x))
        copy(states + p.adjoint, sums, p.first_state);
      else
        each_quad(team, p.first_state, [&](int i) { add_quad(sums + i, quad(states + p.adjoint + i)); });
    }
    for (int l = p.first; l < p.layers; ++l) {
      const InnerLayer& a = p.layer[l];
      A* weight = a.d_weight.task ? of_task(a.d_weight.data, a.d_weight.task) : nullptr;
      A* bias = a.d_bias.task ? of_task(a.d_bias.data, a.d_bias.task) : nullptr;
      if (weight || bias) this->give_layer(a, states + p.adjoint, weight, bias);
    }
  }
};

}  // namespace fastmeta::cuda
