// Class means of one task, and their gradient.
#pragma once

#include <fastmeta/simd.h>

#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

// to += from, to = from * factor: rows of n
template <class T>
FM_INLINE void add_row(T* to, const T* from, int64_t n) {
  constexpr int W = kWidth<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(to + j) + load(from + j));
  for (; j < n; ++j) to[j] += from[j];
}
template <class T>
FM_INLINE void scale_row(T* to, const T* from, T factor, int64_t n) {
  constexpr int W = kWidth<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(from + j) * broadcast(factor));
  for (; j < n; ++j) to[j] = from[j] * factor;
}

FM_INLINE bool is_class(int64_t label, int64_t classes) { return uint64_t(label) < uint64_t(classes); }

// 1 / (members of the class), 0 for an absent one
template <class T>
inline void inverse_counts(const int64_t* labels, int64_t support, int64_t classes, T* out) {
  fill_zero(out, classes);
  for (int64_t s = 0; s < support; ++s)
    if (is_class(labels[s], classes)) out[labels[s]] += 1;
  for (int64_t n = 0; n < classes; ++n) out[n] = out[n] > 0 ? 1 / out[n] : 0;
}

template <class T>
inline void class_means(const T* x, int64_t ldx, const int64_t* labels, const T* inverse, int64_t support,
                        int64_t classes, int64_t width, T* out, int64_t ldo) {
  for (int64_t n = 0; n < classes; ++n) fill_zero(out + n * ldo, width);
  for (int64_t s = 0; s < support; ++s)
    if (is_class(labels[s], classes)) add_row(out + labels[s] * ldo, x + s * ldx, width);
  for (int64_t n = 0; n < classes; ++n) scale_row(out + n * ldo, out + n * ldo, inverse[n], width);
}

// each member of a class gets its share of the prototype's gradient
template <class T>
inline void spread_to_members(const T* grad, int64_t ldg, const int64_t* labels, const T* inverse, int64_t support,
                              int64_t classes, int64_t width, T* out, int64_t ldo) {
  for (int64_t s = 0; s < support; ++s) {
    const int64_t label = labels[s];
    if (is_class(label, classes))
      scale_row(out + s * ldo, grad + label * ldg, inverse[label], width);
    else
      fill_zero(out + s * ldo, width);
  }
}

template <class T>
void prototypes(const cpu::PrototypeItem<T>& item) {
  T* inverse = static_cast<T*>(cpu::thread_scratch(size_t(item.classes) * sizeof(T)));
  inverse_counts(item.labels, item.support, item.classes, inverse);
  class_means(item.x, item.ld, item.labels, inverse, item.support, item.classes, item.width, item.out, item.ld);
}

template <class T>
void prototypes_gradient(const cpu::PrototypeItem<T>& item) {
  T* inverse = static_cast<T*>(cpu::thread_scratch(size_t(item.classes) * sizeof(T)));
  inverse_counts(item.labels, item.support, item.classes, inverse);
  spread_to_members(item.x, item.ld, item.labels, inverse, item.support, item.classes, item.width, item.out, item.ld);
}

}  // namespace fastmeta::FASTMETA_ISA
