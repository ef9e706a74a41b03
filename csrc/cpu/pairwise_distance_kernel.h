// Distances of a range of one task's queries to its prototypes, and their gradients.
#pragma once

#include <fastmeta/gemm.h>

#include "centred.h"
#include "kernels.h"
#include "query_block.h"

namespace fastmeta::FASTMETA_ISA {

// Prototypes of one call: few enough to leave half of a second-level cache to the queries.
template <class T>
int64_t prototypes_at_once(int64_t classes, int64_t width) {
  constexpr int W = kWidth<T>;
  const int64_t room = (256 << 10) / int64_t(sizeof(T)) / larger(width, 1);
  return smaller(padded<T>(larger(classes, 1)), larger(6 * W, room / (6 * W) * (6 * W)));
}

template <class T>
void squared_distances(const cpu::DistanceItem<T>& item) {
  const int64_t chunk = prototypes_at_once<T>(item.classes, item.width);
  Centred<T> near{};
  near.width = item.width;
  near.most = smaller(kRowBlock, larger(item.rows, 1));
  near.classes = chunk;
  Carver carver{nullptr};
  near.carve(carver);
  carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
  near.carve(carver);
  for (int64_t n = 0; n < item.classes; n += chunk) {
    near.classes = smaller(chunk, item.classes - n);
    near.start(item.prototypes + n * item.width);
    for (int64_t start = 0; start < item.rows; start += near.most) {
      const int64_t rows = smaller(near.most, item.rows - start);
      const T* query = item.query + start * item.width;
      T* out = item.out + start * item.classes + n;
      near.products(query, rows, near.classes, out, item.classes);
      near.mend(query, rows, out, item.classes, item.metric == cpu::kEuclidean);
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
