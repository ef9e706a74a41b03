// Squared distances by products, on rows that are centred on the mean prototype: |q - p|^2 - |q|^2 = |p|^2 - 2 q.p is
// one product with one column more, [q, 1] . [-2 p, |p|^2]. Centring changes no distance and keeps a common offset of
// the embeddings out of the rounding.
#pragma once

#include <fastmeta/gemm.h>

#include "carver.h"
#include "class_prototypes_kernel.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct Centred {
  int64_t classes, width, most;  // prototypes, features, queries at a time
  int64_t ld;                    // of all rows here: features, the column more, and padding
  T *centre, *prototypes, *rows, *packed;

  void carve(Carver& c) {
    ld = padded<T>(width + 1);
    centre = c.take<T>(width);
    prototypes = c.take<T>(classes * ld);  // [-2 (p - centre), |p - centre|^2]
    rows = c.take<T>(most * ld);           // [q - centre, 1]
    packed = c.take<T>(padded<T>(classes) * (width + 1));
  }

  // from [classes, width], row stride `from_ld`
  void start(const T* from, int64_t from_ld) {
    fill_zero(centre, width);
    for (int64_t n = 0; n < classes; ++n) add_row(centre, from + n * from_ld, width);
    scale_row(centre, centre, T(1) / T(larger(classes, 1)), width);
    for (int64_t n = 0; n < classes; ++n) {
      T* p = prototypes + n * ld;
      const T square = subtract(from + n * from_ld, p);
      scale_row(p, p, T(-2), width);
      p[width] = square;
    }
    pack_transposed(classes, width + 1, prototypes, ld, packed);
  }

  // to = from - centre; its squared norm
  T subtract(const T* from, T* to) const {
    constexpr int W = kWidth<T>;
    Vec<T> square = {};
    int64_t j = 0;
    for (; j + W <= width; j += W) {
      const Vec<T> x = load(from + j) - load(centre + j);
      store(to + j, x);
      square += x * x;
    }
    T sum = sum_of_lanes<T>(square);
    for (; j < width; ++j) {
      to[j] = from[j] - centre[j];
      sum += to[j] * to[j];
    }
    return sum;
  }

  // Sets `rows`; their squared norms too if asked for.
  void take(const T* query, int64_t count, T* squares = nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const T square = subtract(query + i * width, rows + i * ld);
      rows[i * ld + width] = 1;
      if (squares) squares[i] = square;
    }
  }

  // out[q, n] = |p_n|^2 - 2 q.p_n of the rows taken, plus `row_start[q]`
  void products(int64_t count, int64_t columns, T* out, int64_t ldo, const T* row_start = nullptr) const {
    Finish<T> finish;
    finish.row_start = row_start;
    multiply<T>(count, columns, width + 1, rows, ld, 1, Right<T>{packed, 0, width + 1}, out, ldo, finish);
  }
};

}  // namespace fastmeta::FASTMETA_ISA
