// The prototypical loss of a range of one task's queries, and its gradient; distances live for one block of queries.
#pragma once

#include "class_prototypes_kernel.h"
#include "kernels.h"
#include "query_block.h"

namespace fastmeta::FASTMETA_ISA {

// With squared distances, sum_n g[q, n] = 0 leaves d_query = -2 sum_n g[q, n] p_n: plain products, in place of
// differences. Rows are centred on the mean prototype first, which changes no distance and keeps a common offset out of
// the sums.
template <class T>
struct LossScratch {
  QueryBlock<T> block{};
  T *prototypes, *inverse, *d_prototypes, *centre, *rows;

  LossScratch(const cpu::LossItem<T>& item, bool backward) {
    block.classes = item.classes;
    block.width = item.width;
    block.metric = item.metric;
    block.most = QueryBlock<T>::size(item.query_rows, item.width);
    block.centred = backward && item.metric == cpu::kSqeuclidean;
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      if (pass) carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
      block.carve(carver, backward);
      prototypes = carver.take<T>(item.classes * item.width);
      inverse = carver.take<T>(item.classes);
      centre = block.centred ? carver.take<T>(item.width) : nullptr;
      rows = block.centred ? carver.take<T>(block.most * item.width) : nullptr;
      d_prototypes = backward ? carver.take<T>(item.classes * item.width) : nullptr;
    }
    inverse_counts(item.support_labels, item.support_rows, item.classes, inverse);
    class_means(item.support, item.width, item.support_labels, inverse, item.support_rows, item.classes, item.width,
                prototypes, item.width);
    block.prototypes = prototypes;
    if (block.centred) {
      fill_zero(centre, item.width);
      for (int64_t n = 0; n < item.classes; ++n) add_row(centre, prototypes + n * item.width, item.width);
      scale_row(centre, centre, T(1) / T(larger(item.classes, 1)), item.width);
      for (int64_t n = 0; n < item.classes; ++n) subtract(prototypes + n * item.width, prototypes + n * item.width);
    }
    block.start();
  }

  // to = from - centre, one row
  void subtract(const T* from, T* to) const {
    constexpr int W = kWidth<T>;
    int64_t j = 0;
    for (; j + W <= block.width; j += W) store(to + j, load(from + j) - load(centre + j));
    for (; j < block.width; ++j) to[j] = from[j] - centre[j];
  }
  const T* centred(const T* query, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) subtract(query + i * block.width, rows + i * block.width);
    return rows;
  }
};

template <class T>
void loss(const cpu::LossItem<T>& item) {
  constexpr int W = kWidth<T>;
  LossScratch<T> scratch(item, false);
  QueryBlock<T>& block = scratch.block;
  const int64_t ld = block.most;
  Vec<T> total = {};
  int64_t right = 0;
  for (int64_t start = 0; start < item.query_rows && item.classes > 0; start += ld) {
    const int64_t rows = smaller(ld, item.query_rows - start);
    block.distances(item.query + start * item.width, rows);
    for (int64_t q = 0; q < rows; q += W) {
      const T* d = block.distance + q;
      Vec<T> least = load(d);
      IntVec<T> nearest = {};
      for (int64_t n = 1; n < item.classes; ++n) {
        const Vec<T> x = load(d + n * ld);
        const auto nearer = x < least;
        least = nearer ? x : least;
        nearest = nearer ? broadcast_integer<T>(Lane<T>(n)) : nearest;
      }
      Vec<T> sum = {};
      for (int64_t n = 0; n < item.classes; ++n) sum += exponential<T>(least - load(d + n * ld));
      Vec<T> own = least, counted = {};
      for (int64_t lane = 0; lane < smaller(W, rows - q); ++lane) {
        const int64_t label = item.query_labels[start + q + lane];
        if (!is_class(label, item.classes)) continue;
        own[lane] = d[label * ld + lane];
        counted[lane] = 1;
        right += nearest[lane] == label;
      }
      const Vec<T> each = own - least + logarithm(sum);
      total += counted == 0 ? Vec<T>{} : each;
    }
  }
  *item.loss = sum_of_lanes<T>(total);
  *item.accuracy = T(right);
}

template <class T>
void loss_gradient(const cpu::LossItem<T>& item) {
  constexpr int W = kWidth<T>;
  LossScratch<T> scratch(item, true);
  QueryBlock<T>& block = scratch.block;
  const int64_t ld = block.most;
  T* d_prototypes = item.d_prototypes ? item.d_prototypes : scratch.d_prototypes;
  const bool prototypes_needed = item.d_prototypes || item.d_support;
  if (prototypes_needed) fill_zero(d_prototypes, item.classes * item.width);
  for (int64_t start = 0; start < item.query_rows; start += ld) {
    const int64_t rows = smaller(ld, item.query_rows - start);
    const T* query = item.query + start * item.width;
    if (block.centred) query = scratch.centred(query, rows);
    block.distances(query, rows);
    for (int64_t q = 0; q < rows && item.classes > 0; q += W) {
      const T* d = block.distance + q;
      T* g = block.gradient + q;
      Vec<T> least = load(d);
      for (int64_t n = 1; n < item.classes; ++n) least = minimum(load(d + n * ld), least);
      Vec<T> sum = {};
      for (int64_t n = 0; n < item.classes; ++n) {
        const Vec<T> e = exponential<T>(least - load(d + n * ld));
        store(g + n * ld, e);
        sum += e;
      }
      Vec<T> counted = {};
      const int64_t lanes = smaller(W, rows - q);
      for (int64_t lane = 0; lane < lanes; ++lane)
        if (is_class(item.query_labels[start + q + lane], item.classes)) counted[lane] = item.grad;
      const Vec<T> factor = counted == 0 ? Vec<T>{} : -counted / sum;
      for (int64_t n = 0; n < item.classes; ++n)
        store(g + n * ld, counted == 0 ? Vec<T>{} : load(g + n * ld) * factor);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t label = item.query_labels[start + q + lane];
        if (is_class(label, item.classes)) g[label * ld + lane] += item.grad;
      }
    }
    block.prepare(rows);
    if (item.d_query) block.query_gradient(query, rows, item.d_query + start * item.width);
    if (prototypes_needed) block.prototype_gradient(query, rows, d_prototypes);
  }
  if (prototypes_needed) block.finish_prototypes(d_prototypes);
  if (item.d_support)
    spread_to_members(d_prototypes, item.width, item.support_labels, scratch.inverse, item.support_rows, item.classes,
                      item.width, item.d_support, item.width);
}

}  // namespace fastmeta::FASTMETA_ISA
