// The weights of one task in scratch memory: every layer padded to whole vectors, all in one block.
//
// A layer is kept [out, in], or [in, out] where that is the cheaper padding or spares the first layer a product across
// vectors. Products along the kept rows need nothing else; those across them take a transposed copy where the rows of
// the task are many enough to pay for it, and sums along vectors where they are few.
#pragma once

#include "../carver.h"
#include "operands.h"
#include "gemm.h"
#include "rows.h"

namespace fastmeta::FASTMETA_ISA {

template <class T, class E>
FM_INLINE const E* of_task(const cpu::Operand<E>& o, int64_t task) {
  return o.base + o.step * task;
}
template <class T>
FM_INLINE T* of_task(const cpu::Target<T>& t, int64_t task, int64_t group) {
  return t.base + t.step * task + t.group_step * group;
}

struct InnerLayer {
  int64_t in, out;
  bool by_input;     // kept [in, out]
  int64_t m, n;      // as kept: rows and columns
  int64_t mp, np;    // padded
  int64_t weight, bias, copy;  // offsets in a block; the copy is [n, mp]
  bool copied;       // for the support rows
  bool query_copied;
};

// Whether `rows` rows pay for a transposed copy of m x n numbers: sums along vectors cost by the result, the copy by
// the matrix.
FM_INLINE bool copy_pays(int64_t rows, int64_t n) {
  return 8 * rows > n;
}

template <class T>
struct InnerNet {
  int64_t first, layers;  // those with weights: [first, layers)
  InnerLayer layer[cpu::kMostInnerLayers];
  int64_t size = 0;   // of a block without its copies
  int64_t whole = 0;  // with them

  InnerNet(const cpu::InnerLoop<T>& p) : first(p.gram), layers(p.layers) {
    for (int64_t l = first; l < layers; ++l) {
      InnerLayer& a = layer[l];
      a.in = p.widths[l];
      a.out = p.widths[l + 1];
      const int64_t kept_by_input = a.in * padded<T>(a.out), kept_by_output = a.out * padded<T>(a.in);
      a.by_input = l == 0 ? kept_by_input <= 2 * kept_by_output : kept_by_input < kept_by_output;
      a.m = a.by_input ? a.in : a.out;
      a.n = a.by_input ? a.out : a.in;
      a.mp = padded<T>(a.m);
      a.np = padded<T>(a.n);
      a.weight = size;
      size += a.m * a.np;
      a.bias = size;
      size += padded<T>(a.out);
      const bool crossed = !a.by_input || l > 0;
      a.copied = crossed && a.m >= kWidth<T> && copy_pays(p.support.count, a.n);
      a.query_copied = crossed && a.m >= kWidth<T> && copy_pays(p.query.count, a.n);
    }
    whole = size;
    for (int64_t l = first; l < layers; ++l) {
      layer[l].copy = whole;
      if (layer[l].copied || layer[l].query_copied) whole += layer[l].n * layer[l].mp;
    }
  }

  void pack(const InnerLayer& a, const T* weight, const T* bias, T* block) const {
    T* to = block + a.weight;
    if (a.by_input) {
      transpose(a.out, a.in, weight, a.in, to, a.np, a.np);
    } else {
      for (int64_t o = 0; o < a.out; ++o) copy_padded(weight + o * a.in, a.in, to + o * a.np, a.np);
    }
    if (bias)
      copy_padded(bias, a.out, block + a.bias, padded<T>(a.out));
    else
      fill_zero(block + a.bias, padded<T>(a.out));
  }
  void unpack_weight(const InnerLayer& a, const T* block, T* to) const {
    const T* from = block + a.weight;
    if (a.by_input) return transpose(a.in, a.out, from, a.np, to, a.in, a.in);
    for (int64_t o = 0; o < a.out; ++o) memcpy(to + o * a.in, from + o * a.np, size_t(a.in) * sizeof(T));
  }
  void unpack_bias(const InnerLayer& a, const T* block, T* to) const {
    if (a.out > 0) memcpy(to, block + a.bias, size_t(a.out) * sizeof(T));
  }
  static void copy_padded(const T* from, int64_t n, T* to, int64_t np) {
    if (n > 0) memcpy(to, from, size_t(n) * sizeof(T));
    fill_zero(to + n, np - n);
  }

  void transpose_copies(T* block, bool query) const {
    for (int64_t l = first; l < layers; ++l) {
      const InnerLayer& a = layer[l];
      if (query ? a.query_copied : a.copied) transpose_small(a, block + a.weight, block + a.copy);
    }
  }
  // `transpose` looks ahead in memory, which costs as much again where all is in the first-level cache
  static void transpose_small(const InnerLayer& a, const T* from, T* to) {
    constexpr int B = kBlock<T>;
    if (a.m % B != 0 || a.n % B != 0 || a.m != a.mp || a.m * a.n * int64_t(sizeof(T)) > (16 << 10))
      return transpose(a.m, a.n, from, a.np, to, a.mp, a.mp);
    for (int64_t i = 0; i < a.m; i += B)
      for (int64_t j = 0; j < a.n; j += B) transpose_block<T>(from + i * a.np + j, a.np, to + j * a.mp + i, a.mp);
  }
};

// One side of a product with weights: rows [rows, width], and the block of weights.
template <class T>
struct Factor {
  const T* rows = nullptr;
  int64_t ld = 0;
  const T* block = nullptr;
};

// c [rows, padded] = start + factor * (x W^T + scale * y V^T) (`forward`), or the same with W in place of W^T.
template <class T>
struct ReluStore {  // of relu
  bool relu = false;
  const T* mask = nullptr;
};

template <class T>
void through_layer(const InnerLayer& a, bool forward, bool copied, int64_t rows, Factor<T> x, Factor<T> y, T scale,
                   T* c, const T* start, int64_t start_row, ReluStore<T> end = {}, T factor = 1) {
  const bool along = forward == a.by_input;
  const int64_t columns = along ? a.n : a.m, width = padded<T>(columns);
  const int64_t from = along || !copied ? a.weight : a.copy, b_row = along || !copied ? a.np : a.mp;
  Product<T> p;
  p.c = c;
  p.ldc = width;
  p.start = start;
  p.start_row = start_row;
  p.other_scale = scale;
  p.factor = factor;
  p.relu = end.relu;
  p.mask = end.mask;
  if (along || copied) {
    const int64_t depth = along ? a.m : a.n;
    p.term = {x.rows, x.ld, 1, x.block + from, b_row, depth};
    if (y.block) p.other = {y.rows, y.ld, 1, y.block + from, b_row, depth};
    return multiply_along(rows, width, p);
  }
  p.term = {x.rows, x.ld, 1, x.block + from, b_row, a.np};
  if (y.block) p.other = {y.rows, y.ld, 1, y.block + from, b_row, a.np};
  multiply_across(rows, columns, p);
  if (columns != width)
    for (int64_t i = 0; i < rows; ++i) fill_zero(c + i * width + columns, width - columns);
}

// to = from + factor * (delta^T input + delta2^T input2), as the layer is kept; the second pair may be null.
template <class T>
void add_gradient(const InnerLayer& a, int64_t rows, const T* delta, const T* input, int64_t ld_input, const T* delta2,
                  const T* input2, const T* from, int64_t from_row, T factor, T* to) {
  const int64_t ld_delta = padded<T>(a.out);
  Product<T> p;
  p.c = to;
  p.ldc = a.np;
  p.start = from;
  p.start_row = from_row;
  p.factor = factor;
  const auto term = [&](const T* d, const T* x) __attribute__((always_inline)) {
    return a.by_input ? Term<T>{x, 1, ld_input, d, ld_delta, rows} : Term<T>{d, 1, ld_delta, x, ld_input, rows};
  };
  p.term = term(delta, input);
  if (delta2) p.other = term(delta2, input2);
  multiply_along(a.m, a.np, p);
}

// to = from + factor * sums of the columns of rows [rows, n]
template <class T>
void add_column_sums(int64_t rows, int64_t n, const T* x, const T* from, T factor, T* to) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < n; j += W) {
    Vec<T> even = {}, odd = {};
    int64_t i = 0;
    for (; i + 1 < rows; i += 2) {
      even += load(x + i * n + j);
      odd += load(x + i * n + n + j);
    }
    if (i < rows) even += load(x + i * n + j);
    store(to + j, load(from + j) + factor * (even + odd));
  }
}

template <class T>
FM_INLINE T dot_product(const T* a, const T* b, int64_t n) {
  Vec<T> sums = {};
  for (int64_t i = 0; i < n; i += kWidth<T>) sums += load(a + i) * load(b + i);
  return lane_sum<T>(sums);
}

}  // namespace fastmeta::FASTMETA_ISA
