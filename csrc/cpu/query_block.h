// A block of queries against the prototypes of their task, with the queries in the vector lanes: distances
// [classes, queries], and from a gradient of that shape the gradients of queries and prototypes.
//
// Lanes of queries keep a softmax over classes free of horizontal sums.
#pragma once

#include <fastmeta/gemm.h>
#include <fastmeta/vmath.h>

#include "carver.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

constexpr double kNormEpsilon = 1e-8;

template <class T>
inline T squared_norm(const T* x, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> a = {}, b = {};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    const Vec<T> u = load(x + j), v = load(x + j + W);
    a += u * u;
    b += v * v;
  }
  for (; j < n; j += W) {
    const Vec<T> u = load_first(x + j, smaller(W, n - j));
    a += u * u;
  }
  return sum_of_lanes<T>(a + b);
}

// 1 / max(|x|, eps) of every row; `free` says which norms are above eps and so have a gradient
template <class T>
inline void inverse_norms(const T* x, int64_t rows, int64_t width, T* inverse, bool* free) {
  for (int64_t i = 0; i < rows; ++i) {
    const T square = squared_norm(x + i * width, width), least = T(kNormEpsilon * kNormEpsilon);
    inverse[i] = 1 / T(sqrt(double(square < least ? least : square)));
    if (free) free[i] = square >= least;
  }
}

template <class T>
struct QueryBlock {
  int64_t classes, width, metric;
  const T* prototypes;  // [classes, width]
  int64_t most;         // queries of a block, a multiple of the vector width
  T* packed;            // prototypes transposed, in panels
  T* by_query;          // distances as they are formed, [most, padded classes]
  T* distance;          // [padded classes, most]
  T* gradient;          // [classes, most], of the loss with respect to the distances
  T* inverse_query;     // cosine: 1 / norm
  T* inverse_prototype;
  bool* free_query;     // cosine: the norm is above eps
  bool* free_prototype;
  T* own_query;         // cosine: what multiplies the row itself in its gradient
  T* own_prototype;

  void carve(Carver& c, bool backward) {
    packed = c.take<T>(padded<T>(classes) * width);
    by_query = c.take<T>(most * padded<T>(classes));
    distance = c.take<T>(padded<T>(classes) * most);
    gradient = backward ? c.take<T>(classes * most) : nullptr;
    inverse_query = c.take<T>(most);
    inverse_prototype = c.take<T>(padded<T>(classes));
    free_query = c.take<bool>(most);
    free_prototype = c.take<bool>(classes);
    own_query = c.take<T>(most);
    own_prototype = c.take<T>(classes);
  }

  // Few enough queries for their rows to stay in the second-level cache, spread evenly over the blocks.
  static int64_t size(int64_t queries, int64_t width) {
    constexpr int W = kWidth<T>;
    const int64_t room = (256 << 10) / int64_t(sizeof(T)) / larger(width, 1);
    const int64_t most = larger(2 * W, smaller(96, room / W * W));
    return larger(W, padded<T>(divide_up(larger(queries, 1), divide_up(larger(queries, 1), most))));
  }

  void start() {
    fill_zero(own_prototype, classes);
    pack_transposed(classes, width, prototypes, width, packed);
    if (metric != cpu::kCosine) return;
    inverse_norms(prototypes, classes, width, inverse_prototype, free_prototype);
    fill_zero(inverse_prototype + classes, padded<T>(classes) - classes);
  }

  // distance[n, q] of `rows` queries. Formed with classes in the lanes, which reads the queries as they stand, and
  // transposed afterwards: there are fewer classes than features.
  void distances(const T* query, int64_t rows) {
    Finish<T> finish;
    if (metric == cpu::kEuclidean) finish.then = Finish<T>::root;
    if (metric == cpu::kDot) finish.then = Finish<T>::scale, finish.factor = -1;
    if (metric == cpu::kCosine) {
      inverse_norms(query, rows, width, inverse_query, free_query);
      fill_zero(inverse_query + rows, most - rows);
      finish.then = Finish<T>::cosine;
      finish.row_factor = inverse_query;
      finish.column_factor = inverse_prototype;
    }
    const int64_t lanes = padded<T>(classes);
    const Right<T> b{packed, 0, larger(width, 1)};
    if (metric == cpu::kManhattan)
      multiply<T, Combine::absolute_difference>(rows, lanes, width, query, width, 1, b, by_query, lanes, finish);
    else if (metric == cpu::kCosine || metric == cpu::kDot)
      multiply<T, Combine::product>(rows, lanes, width, query, width, 1, b, by_query, lanes, finish);
    else
      multiply<T, Combine::squared_difference>(rows, lanes, width, query, width, 1, b, by_query, lanes, finish);
    transpose(rows, lanes, by_query, lanes, distance, most, padded<T>(rows));  // whole blocks
  }

  // Turns d loss / d distance into the factors of the rows in the gradients.
  void prepare(int64_t rows) {
    constexpr int W = kWidth<T>;
    if (metric == cpu::kManhattan) return;
    if (metric == cpu::kCosine) fill_zero(own_query, most);
    for (int64_t n = 0; n < classes; ++n) {
      T* g = gradient + n * most;
      const T* d = distance + n * most;
      Vec<T> own = {};
      for (int64_t q = 0; q < rows; q += W) {
        const Vec<T> x = load(g + q);
        if (metric == cpu::kSqeuclidean) {
          store(g + q, x + x);
        } else if (metric == cpu::kDot) {
          store(g + q, -x);
        } else if (metric == cpu::kEuclidean) {
          const Vec<T> distance_here = load(d + q);
          store(g + q, distance_here == 0 ? Vec<T>{} : x / distance_here);
        } else {
          const Vec<T> inverse = load(inverse_query + q);
          const Vec<T> part = x * (1 - load(d + q));
          store(own_query + q, load(own_query + q) + part);
          // gradient lanes beyond the last query are zero
          own += part;
          store(g + q, -x * inverse * broadcast(inverse_prototype[n]));
        }
      }
      if (metric == cpu::kCosine) own_prototype[n] += sum_of_lanes<T>(own);
    }
    if (metric == cpu::kCosine)
      for (int64_t q = 0; q < rows; ++q)
        own_query[q] = free_query[q] ? own_query[q] * inverse_query[q] * inverse_query[q] : 0;
  }

  static void add_own(int64_t rows, int64_t width, const T* own, const T* x, T* out) {
    constexpr int W = kWidth<T>;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += W) {
        const int64_t n = smaller(W, width - j);
        T* to = out + i * width + j;
        store_first(to, load_first(to, n) + broadcast(own[i]) * load_first(x + i * width + j, n), n);
      }
  }

  // d_query of these rows, written
  void query_gradient(const T* query, int64_t rows, T* d_query) {
    if (metric == cpu::kManhattan)
      return multiply_differences<T, true>(rows, width, classes, gradient, 1, most, query, width, prototypes, width,
                                           d_query, width, false);
    if (metric == cpu::kCosine || metric == cpu::kDot) {
      multiply<T>(rows, width, classes, gradient, 1, most, Right<T>{prototypes, width}, d_query, width, Finish<T>{});
      if (metric == cpu::kCosine) add_own(rows, width, own_query, query, d_query);
      return;
    }
    multiply_differences<T, false>(rows, width, classes, gradient, 1, most, query, width, prototypes, width, d_query,
                                   width, false);
  }

  // adds these rows' part to d_prototypes
  void prototype_gradient(const T* query, int64_t rows, T* d_prototypes) {
    if (metric == cpu::kManhattan)
      return multiply_differences<T, true>(classes, width, rows, gradient, most, 1, prototypes, width, query, width,
                                           d_prototypes, width, true);
    if (metric == cpu::kCosine || metric == cpu::kDot) {
      Finish<T> finish;
      finish.add = true;
      return multiply<T>(classes, width, rows, gradient, most, 1, Right<T>{query, width}, d_prototypes, width, finish);
    }
    multiply_differences<T, false>(classes, width, rows, gradient, most, 1, prototypes, width, query, width,
                                   d_prototypes, width, true);
  }

  // once, after the last block
  void finish_prototypes(T* d_prototypes) {
    if (metric != cpu::kCosine) return;
    for (int64_t n = 0; n < classes; ++n)
      own_prototype[n] = free_prototype[n] ? own_prototype[n] * inverse_prototype[n] * inverse_prototype[n] : 0;
    add_own(classes, width, own_prototype, prototypes, d_prototypes);
  }
};

}  // namespace fastmeta::FASTMETA_ISA
