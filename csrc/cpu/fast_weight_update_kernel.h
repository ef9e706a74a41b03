// params - lr * grads for a block of one tensor, and its gradient. Bound by memory: one pass, whole vectors.
#pragma once

#include <fastmeta/simd.h>

#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

// lanes of an operand that has one number per column, or one for the row
template <bool kColumns, bool kWhole, class T>
FM_INLINE Vec<T> operand(const T* p, int64_t j, int64_t n) {
  if constexpr (!kColumns) return broadcast(*p);
  if constexpr (kWhole) return load(p + j);
  return load_first(p + j, n);
}
template <bool kWhole, class T>
FM_INLINE void put(T* p, Vec<T> v, int64_t n) {
  if constexpr (kWhole)
    store(p, v);
  else
    store_first(p, v, n);
}

template <class T, bool kParam, bool kGrad, bool kLr>
void update_rows(const cpu::UpdateItem<T>& item) {
  constexpr int W = kWidth<T>;
  const int64_t whole = item.columns / W * W, rest = item.columns - whole;
  for (int64_t r = 0; r < item.rows; ++r) {
    const T* p = item.param + r * item.param_row;
    const T* g = item.grad + r * item.grad_row;
    const T* l = item.lr ? item.lr + r * item.lr_row : &item.rate;
    T* out = item.out + r * item.out_row;
    for (int64_t j = 0; j < whole; j += W)
      store(out + j, operand<kParam, true>(p, j, W) - operand<kLr, true>(l, j, W) * operand<kGrad, true>(g, j, W));
    if (rest)
      store_first(out + whole,
                  operand<kParam, false>(p, whole, rest) -
                      operand<kLr, false>(l, whole, rest) * operand<kGrad, false>(g, whole, rest),
                  rest);
  }
}

template <class T>
void update(const cpu::UpdateItem<T>& item) {
  const int which = item.param_column * 4 + item.grad_column * 2 + (item.lr && item.lr_column);
  switch (which) {
    case 0: return update_rows<T, false, false, false>(item);
    case 1: return update_rows<T, false, false, true>(item);
    case 2: return update_rows<T, false, true, false>(item);
    case 3: return update_rows<T, false, true, true>(item);
    case 4: return update_rows<T, true, false, false>(item);
    case 5: return update_rows<T, true, false, true>(item);
    case 6: return update_rows<T, true, true, false>(item);
    case 7: return update_rows<T, true, true, true>(item);
  }
}

// One of the two gradients: where it goes, and how it is summed.
template <class T, bool kColumns>
struct Sink {
  T* out;
  int64_t row;  // stride; 0: rows are summed
  T* to = nullptr;
  bool add = false;
  Vec<T> sum = {};

  FM_INLINE void begin(int64_t r) {
    to = out + r * row;
    add = row == 0 && r > 0;
  }
  template <bool kWhole>
  FM_INLINE void take(int64_t j, Vec<T> v, int64_t n) {
    if constexpr (kColumns)
      put<kWhole>(to + j, add ? v + operand<true, kWhole>(static_cast<const T*>(to), j, n) : v, n);
    else
      sum += v;
  }
  FM_INLINE void end() {
    if constexpr (!kColumns) {
      *to = add ? *to + sum_of_lanes<T>(sum) : sum_of_lanes<T>(sum);
      sum = Vec<T>{};
    }
  }
};

template <class T, bool kGrad, bool kLr>
void update_gradient_rows(const cpu::UpdateGradientItem<T>& item) {
  constexpr int W = kWidth<T>;
  const int64_t whole = item.columns / W * W, rest = item.columns - whole;
  Sink<T, kGrad> d_grad{item.d_grad, item.d_grad_row};
  Sink<T, kLr> d_lr{item.d_lr, item.d_lr_row};
  for (int64_t r = 0; r < item.rows; ++r) {
    const T* o = item.out_grad + r * item.out_row;
    const T* g = item.grad + r * item.grad_row;
    const T* l = item.lr ? item.lr + r * item.lr_row : &item.rate;
    if (item.d_grad) d_grad.begin(r);
    if (item.d_lr) d_lr.begin(r);
    for (int64_t j = 0; j < whole; j += W) {
      const Vec<T> out = -load(o + j);
      if (item.d_grad) d_grad.template take<true>(j, out * operand<kLr, true>(l, j, W), W);
      if (item.d_lr) d_lr.template take<true>(j, out * operand<kGrad, true>(g, j, W), W);
    }
    if (rest) {
      const Vec<T> out = -load_first(o + whole, rest);
      if (item.d_grad) d_grad.template take<false>(whole, out * operand<kLr, false>(l, whole, rest), rest);
      if (item.d_lr) d_lr.template take<false>(whole, out * operand<kGrad, false>(g, whole, rest), rest);
    }
    if (item.d_grad) d_grad.end();
    if (item.d_lr) d_lr.end();
  }
}

template <class T>
void update_gradient(const cpu::UpdateGradientItem<T>& item) {
  switch (item.grad_column * 2 + (item.lr && item.lr_column)) {
    case 0: return update_gradient_rows<T, false, false>(item);
    case 1: return update_gradient_rows<T, false, true>(item);
    case 2: return update_gradient_rows<T, true, false>(item);
    case 3: return update_gradient_rows<T, true, true>(item);
  }
}

}  // namespace fastmeta::FASTMETA_ISA
