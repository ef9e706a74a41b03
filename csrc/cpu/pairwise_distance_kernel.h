// Distances of a range of one task's queries to its prototypes, and their gradients.
#pragma once

#include <fastmeta/gemm.h>

#include "centred.h"
#include "kernels.h"
#include "query_block.h"

namespace fastmeta::FASTMETA_ISA {

// Below this part of |q|^2 + |p|^2 a distance has lost three bits to cancellation: it is formed anew from differences,
// which gives exactly 0 for equal points, and never less.
constexpr double kCancelled = 0.125;

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

// Those of `count` distances that are below `own + least[n]`, from differences.
template <class T>
void form_anew(const T* query, const T* prototypes, int64_t width, T own, const T* least, int64_t count, T* out) {
  for (int64_t n = 0; n < count; ++n)
    if (!(out[n] >= own + least[n])) out[n] = difference_squared(query, prototypes + n * width, width);
}

// Prototypes of one call: few enough to leave half of a second-level cache to the queries.
template <class T>
int64_t prototypes_at_once(int64_t classes, int64_t width) {
  constexpr int W = kWidth<T>;
  const int64_t room = (256 << 10) / int64_t(sizeof(T)) / larger(width, 1);
  return smaller(padded<T>(larger(classes, 1)), larger(6 * W, room / (6 * W) * (6 * W)));
}

template <class T>
void squared_distances(const cpu::DistanceItem<T>& item) {
  constexpr int W = kWidth<T>;
  const int64_t chunk = prototypes_at_once<T>(item.classes, item.width);
  Centred<T> near{};
  near.width = item.width;
  near.most = smaller(kRowBlock, larger(item.rows, 1));
  const bool root = item.metric == cpu::kEuclidean;
  T *squares = nullptr, *least = nullptr;
  Carver carver{nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    near.classes = chunk;
    near.carve(carver);
    squares = carver.take<T>(near.most);
    least = carver.take<T>(padded<T>(chunk));
  }
  for (int64_t n = 0; n < item.classes; n += chunk) {
    const T* prototypes = item.prototypes + n * item.width;
    near.classes = smaller(chunk, item.classes - n);
    near.start(prototypes, item.width);
    for (int64_t i = 0; i < near.classes; ++i) least[i] = T(kCancelled) * near.prototypes[i * near.ld + item.width];
    for (int64_t i = near.classes; i < padded<T>(chunk); ++i) least[i] = -T(__builtin_inff());
    for (int64_t start = 0; start < item.rows; start += near.most) {
      const int64_t rows = smaller(near.most, item.rows - start);
      const T* query = item.query + start * item.width;
      T* block = item.out + start * item.classes + n;
      near.take(query, rows, squares);
      near.products(rows, near.classes, block, item.classes, squares);
      for (int64_t q = 0; q < rows; ++q) {
        T* out = block + q * item.classes;
        const Vec<T> own = broadcast(T(kCancelled) * squares[q]);
        int64_t i = 0;
        for (; i + W <= near.classes; i += W) {
          const Vec<T> x = load(out + i);
          // NaN counts as cancelled: infinity less infinity is one
          if (__builtin_expect(!all_lanes(x >= own + load(least + i)), 0))
            form_anew(query + q * item.width, prototypes + i * item.width, item.width, own[0], least + i, W, out + i);
          if (root) store(out + i, square_root(load(out + i)));
        }
        if (i == near.classes) continue;
        const int64_t lanes = near.classes - i;
        if (__builtin_expect(!all_lanes(load_first(out + i, lanes) >= own + load(least + i)), 0))
          form_anew(query + q * item.width, prototypes + i * item.width, item.width, own[0], least + i, lanes, out + i);
        if (root) store_first(out + i, square_root(load_first(out + i, lanes)), lanes);
      }
    }
  }
}

template <class T>
void distances(const cpu::DistanceItem<T>& item) {
  if (item.metric == cpu::kSqeuclidean || item.metric == cpu::kEuclidean) return squared_distances(item);
  const int64_t width = item.width, chunk = prototypes_at_once<T>(item.classes, width);
  T *packed = nullptr, *inverse_query = nullptr, *inverse_prototype = nullptr;
  Carver carver{nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    packed = carver.take<T>(chunk * width);
    inverse_query = carver.take<T>(item.rows);
    inverse_prototype = carver.take<T>(chunk);
  }
  Finish<T> finish;
  if (item.metric == cpu::kDot) finish.then = Finish<T>::scale, finish.factor = -1;
  if (item.metric == cpu::kCosine) {
    finish.then = Finish<T>::cosine;
    finish.row_factor = inverse_query;
    finish.column_factor = inverse_prototype;
    inverse_norms<T>(item.query, item.rows, width, inverse_query, nullptr);
  }
  for (int64_t n = 0; n < item.classes; n += chunk) {
    const int64_t classes = smaller(chunk, item.classes - n);
    const T* p = item.prototypes + n * width;
    pack_transposed(classes, width, p, width, packed);
    if (item.metric == cpu::kCosine) {
      inverse_norms<T>(p, classes, width, inverse_prototype, nullptr);
      for (int64_t i = classes; i < padded<T>(classes); ++i) inverse_prototype[i] = 0;
    }
    const Right<T> b{packed, 0, larger(width, 1)};
    T* out = item.out + n;
    if (item.metric == cpu::kManhattan)
      multiply<T, Combine::absolute_difference>(item.rows, classes, width, item.query, width, 1, b, out, item.classes,
                                                finish);
    else
      multiply<T, Combine::product>(item.rows, classes, width, item.query, width, 1, b, out, item.classes, finish);
  }
}

template <class T>
void distances_gradient(const cpu::DistanceItem<T>& item) {
  QueryBlock<T> block{};
  block.classes = item.classes;
  block.width = item.width;
  block.metric = item.metric;
  block.prototypes = item.prototypes;
  block.most = QueryBlock<T>::size(item.rows, item.width);
  Carver carver{nullptr};
  block.carve(carver, true);
  carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
  block.carve(carver, true);
  block.start();
  if (item.d_prototypes) fill_zero(item.d_prototypes, item.classes * item.width);
  for (int64_t q = 0; q < item.rows; q += block.most) {
    const int64_t rows = smaller(block.most, item.rows - q);
    const T* query = item.query + q * item.width;
    transpose(rows, item.classes, item.grad + q * item.classes, item.classes, block.gradient, block.most,
              padded<T>(rows));
    if (item.metric == cpu::kEuclidean || item.metric == cpu::kCosine) block.distances(query, rows);
    block.prepare(rows);
    if (item.d_query) block.query_gradient(query, rows, item.d_query + q * item.width);
    if (item.d_prototypes) block.prototype_gradient(query, rows, item.d_prototypes);
  }
  if (item.d_prototypes) block.finish_prototypes(item.d_prototypes);
}

}  // namespace fastmeta::FASTMETA_ISA
