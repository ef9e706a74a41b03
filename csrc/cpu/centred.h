// Squared distances by products, on rows that are centred on the mean prototype: |q - p|^2 - |q|^2 = |p|^2 - 2 q.p is
// one product with one column more, [q, 1] . [-2 p, |p|^2]. Centring changes no distance and keeps a common offset of
// the embeddings out of the rounding. Points that are close beside the spread of all cancel, and are formed anew.
#pragma once

#include <fastmeta/gemm.h>

#include "carver.h"
#include "class_prototypes_kernel.h"

namespace fastmeta::FASTMETA_ISA {

// Below this part of |q|^2 + |p|^2 a squared distance has lost three bits to cancellation: it is formed anew from
// differences, which gives exactly 0 for equal points, and never less.
constexpr double kCancelled = 0.125;
// Below this part the difference q - p has lost as many: its length is an eighth of theirs.
constexpr double kClose = 1.0 / 128;

template <class T>
T difference_squared(const T* a, const T* b, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> sum = {};
  for (int64_t j = 0; j < n; j += W) {
    const int64_t lanes = smaller(W, n - j);
    const Vec<T> x = load_first(a + j, lanes) - load_first(b + j, lanes);
    sum += x * x;
  }
  return sum_of_lanes<T>(sum);
}

template <class T>
struct Centred {
  int64_t classes, width, most;  // prototypes, features, queries at a time
  int64_t ld;                    // of all rows here: features, the column more, and padding
  const T* given;                // the prototypes as they came, [classes, width]
  T *centre, *prototypes, *rows, *packed;
  T *squares, *least;  // |q|^2; the prototype's part of the least distance that has not cancelled

  void carve(Carver& c) {
    ld = padded<T>(width + 1);
    centre = c.take<T>(width);
    prototypes = c.take<T>(classes * ld);  // [-2 (p - centre), |p - centre|^2]
    rows = c.take<T>(most * ld);           // [q - centre, 1]
    packed = c.take<T>(padded<T>(classes) * (width + 1));
    squares = c.take<T>(padded<T>(most));
    least = c.take<T>(padded<T>(classes));
  }

  void start(const T* from) {
    given = from;
    fill_zero(centre, width);
    for (int64_t n = 0; n < classes; ++n) add_row(centre, from + n * width, width);
    scale_row(centre, centre, T(1) / T(larger(classes, 1)), width);
    for (int64_t n = 0; n < classes; ++n) {
      T* p = prototypes + n * ld;
      const T square = subtract(from + n * width, p);
      scale_row(p, p, T(-2), width);
      p[width] = square;
      least[n] = T(kCancelled) * square;
    }
    for (int64_t n = classes; n < padded<T>(classes); ++n) least[n] = -T(__builtin_inff());
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

  // Squared distances [count, columns] of these queries to all prototypes, some of them cancelled; columns are
  // the prototypes, maybe up to their padding. Leaves the centred queries in `rows`.
  void products(const T* query, int64_t count, int64_t columns, T* out, int64_t ldo) {
    for (int64_t i = 0; i < count; ++i) {
      squares[i] = subtract(query + i * width, rows + i * ld);
      rows[i * ld + width] = 1;
    }
    Finish<T> finish;
    finish.row_start = squares;
    multiply<T>(count, columns, width + 1, rows, ld, 1, Right<T>{packed, 0, width + 1}, out, ldo, finish);
  }

  // Forms anew what has cancelled of out [count, classes].
  void mend(const T* query, int64_t count, T* out, int64_t ldo, bool root) const {
    constexpr int W = kWidth<T>;
    for (int64_t q = 0; q < count; ++q) {
      T* to = out + q * ldo;
      const Vec<T> own = broadcast(T(kCancelled) * squares[q]);
      int64_t n = 0;
      for (; n + W <= classes; n += W) {
        if (__builtin_expect(!all_lanes(load(to + n) > own + load(least + n)), 0))
          form_anew(query + q * width, q, n, W, to + n, 1);
        if (root) store(to + n, square_root(load(to + n)));
      }
      if (n == classes) continue;
      const int64_t lanes = classes - n;
      if (__builtin_expect(!all_lanes(load_first(to + n, lanes) > own + load(least + n)), 0))
        form_anew(query + q * width, q, n, lanes, to + n, 1);
      if (root) store_first(to + n, square_root(load_first(to + n, lanes)), lanes);
    }
  }

  // The same of distances with the queries in the lanes, [classes, count]. Says whether any pair is close.
  bool mend_lanes(const T* query, int64_t count, T* out, int64_t ldo) {
    constexpr int W = kWidth<T>;
    for (int64_t q = count; q < padded<T>(count); ++q) squares[q] = -T(__builtin_inff());
    bool close = false;
    for (int64_t q = 0; q < count; q += W) {
      const Vec<T> own = T(kCancelled) * load(squares + q);
      IntVec<T> kept = ~IntVec<T>{};
      for (int64_t n = 0; n < classes; ++n) kept &= load(out + n * ldo + q) > own + broadcast(least[n]);
      if (__builtin_expect(all_lanes(kept), 1)) continue;
      for (int64_t i = q; i < smaller(q + W, count); ++i)
        close |= form_anew(query + i * width, i, 0, classes, out + i, ldo);
    }
    return close;
  }

  // Of a query's distances to prototypes [first, first + count), `step` apart, those that have cancelled. NaN counts as
  // such, as infinity less infinity is, and what is no more than infinity. Says whether any pair is close.
  __attribute__((noinline)) bool form_anew(const T* query, int64_t q, int64_t first, int64_t count, T* out,
                                           int64_t step) const {
    bool close = false;
    for (int64_t i = 0; i < count; ++i, out += step) {
      const T limit = T(kCancelled) * squares[q] + least[first + i];
      if (*out > limit) continue;
      *out = difference_squared(query, given + (first + i) * width, width);
      close |= !(*out > limit * T(kClose / kCancelled));
    }
    return close;
  }
};

}  // namespace fastmeta::FASTMETA_ISA
