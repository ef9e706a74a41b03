// The prototypical loss of a range of one task's queries, and its gradient; distances live for one block of queries.
#pragma once

#include "centred.h"
#include "class_prototypes_kernel.h"
#include "kernels.h"
#include "query_block.h"

namespace fastmeta::FASTMETA_ISA {

// Squared distances are products on centred rows (centred.h). The rows of their gradient sum to zero, so the gradients
// of queries and prototypes are products too, but for blocks where some pair is close: differences keep their digits.
template <class T>
struct LossBlock {
  QueryBlock<T> block{};
  Centred<T> near{};
  bool centred, close = false;  // whether some pair of the block at hand is
  bool products = false;        // whether some block's gradients were products
  T *prototypes, *inverse, *d_prototypes, *sums;
  T* of_close = nullptr;  // what close blocks add to d_prototypes

  LossBlock(const cpu::LossItem<T>& item, bool backward) {
    centred = item.metric == cpu::kSqeuclidean;
    near.classes = block.classes = item.classes;
    near.width = block.width = item.width;
    block.metric = item.metric;
    near.most = block.most = QueryBlock<T>::size(item.query_rows, item.width);
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      if (pass) carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
      block.carve(carver, backward);
      if (centred) near.carve(carver);
      prototypes = carver.take<T>(item.classes * item.width);
      inverse = carver.take<T>(item.classes);
      sums = carver.take<T>(item.classes);
      d_prototypes = backward ? carver.take<T>(item.classes * item.width) : nullptr;
      if (centred && backward) of_close = carver.take<T>(item.classes * item.width);
    }
    inverse_counts(item.support_labels, item.support_rows, item.classes, inverse);
    class_means(item.support, item.width, item.support_labels, inverse, item.support_rows, item.classes, item.width,
                prototypes, item.width);
    block.prototypes = prototypes;
    fill_zero(sums, item.classes);
    if (of_close) fill_zero(of_close, item.classes * item.width);
    if (centred)
      near.start(prototypes);
    else
      block.start();
  }

  // block.distance of these queries
  void distances(const T* query, int64_t rows) {
    if (!centred) return block.distances(query, rows);
    const int64_t lanes = padded<T>(block.classes);
    near.products(query, rows, lanes, block.by_query, lanes);
    transpose(rows, lanes, block.by_query, lanes, block.distance, block.most, padded<T>(rows));
    close = near.mend_lanes(query, rows, block.distance, block.most);
  }

  // after `distances`, with block.gradient set: writes d_query, adds to d_prototypes, unless null
  void gradients(const T* query, int64_t rows, T* d_query, T* to) {
    const int64_t most = block.most, width = block.width;
    if (!centred || close) {
      block.prepare(rows);
      if (d_query) block.query_gradient(query, rows, d_query);
      if (to) block.prototype_gradient(query, rows, centred ? of_close : to);
      return;
    }
    products = true;
    Finish<T> finish;
    if (d_query)
      multiply<T>(rows, width, block.classes, block.gradient, 1, most, Right<T>{near.prototypes, near.ld, 0, true},
                  d_query, width, finish);
    if (!to) return;
    finish.add = true;
    for (int64_t n = 0; n < block.classes; ++n) sums[n] += sum_of_row(block.gradient + n * most, rows);
    multiply<T>(block.classes, width, rows, block.gradient, most, 1, Right<T>{near.rows, near.ld, 0, true}, to, width,
                finish);
  }

  // once, after the last block
  void finish(T* to) {
    if (!centred) return block.finish_prototypes(to);
    // sum_q g 2 (p - q), of which `to` holds sum_q g q
    for (int64_t n = 0; n < block.classes; ++n)
      for (int64_t j = 0; j < block.width; ++j) {
        T& out = to[n * block.width + j];
        // without products not even their zeros: the centre may not be finite
        if (products) out = T(-2) * out - sums[n] * near.prototypes[n * near.ld + j];
        out += of_close[n * block.width + j];
      }
  }
};

// Sums over queries in the lanes, from their distances [classes, ld].
template <class T>
struct LossSums {
  Vec<T> total = {};
  int64_t right = 0;

  // `least` of a query's distances, `sum` of exp(least - distance)
  void add(const T* d, int64_t ld, int64_t classes, int64_t lanes, const int64_t* labels, Vec<T> least, Vec<T> sum) {
    constexpr int W = kWidth<T>;
    IntVec<T> nearest = {};
    for (int64_t n = classes - 1; n > 0; --n)
      nearest = load(d + n * ld) == least ? broadcast_integer<T>(Lane<T>(n)) : nearest;
    nearest = load(d) == least ? IntVec<T>{} : nearest;
    // single lanes by way of memory: a vector that is changed lane by lane is stored and read each time
    alignas(64) T own[W] = {}, counted[W] = {};
    alignas(64) Lane<T> guess[W];
    memcpy(guess, &nearest, sizeof(guess));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t label = labels[lane];
      if (!is_class(label, classes)) continue;
      own[lane] = d[label * ld + lane];
      counted[lane] = 1;
      right += guess[lane] == label;
    }
    const Vec<T> each = load(own) - least + logarithm(sum);
    if (__builtin_expect(!all_lanes(each < T(__builtin_inff())), 0))
      right -= unordered(d, ld, classes, lanes, labels, guess);
    total += load(counted) == 0 ? Vec<T>{} : each;
  }
  // Queries counted as right though a distance is NaN, which `least` passes over: then nothing is nearest.
  static __attribute__((noinline)) int64_t unordered(const T* d, int64_t ld, int64_t classes, int64_t lanes,
                                                     const int64_t* labels, const Lane<T>* guess) {
    int64_t count = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      bool any = false;
      for (int64_t n = 0; n < classes; ++n) any = any || __builtin_isnan(d[n * ld + lane]);
      count += any && guess[lane] == labels[lane];
    }
    return count;
  }
  void write(const cpu::LossItem<T>& item) const {
    *item.loss = sum_of_lanes<T>(total);
    *item.accuracy = T(right);
  }
};

template <class T>
void loss(const cpu::LossItem<T>& item) {
  constexpr int W = kWidth<T>;
  LossBlock<T> scratch(item, false);
  QueryBlock<T>& block = scratch.block;
  const int64_t ld = block.most;
  LossSums<T> sums;
  for (int64_t start = 0; start < item.query_rows && item.classes > 0; start += ld) {
    const int64_t rows = smaller(ld, item.query_rows - start);
    scratch.distances(item.query + start * item.width, rows);
    for (int64_t q = 0; q < rows; q += W) {
      const T* d = block.distance + q;
      Vec<T> least = load(d);
      for (int64_t n = 1; n < item.classes; ++n) least = minimum(load(d + n * ld), least);
      Vec<T> sum = {};
      for (int64_t n = 0; n < item.classes; ++n) sum += exponential<T>(least - load(d + n * ld));
      sums.add(d, ld, item.classes, smaller(W, rows - q), item.query_labels + start + q, least, sum);
    }
  }
  sums.write(item);
}

template <class T>
void loss_gradient(const cpu::LossItem<T>& item) {
  constexpr int W = kWidth<T>;
  LossBlock<T> scratch(item, true);
  QueryBlock<T>& block = scratch.block;
  const int64_t ld = block.most;
  T* d_prototypes = item.d_prototypes ? item.d_prototypes : scratch.d_prototypes;
  const bool prototypes_needed = item.d_prototypes || item.d_support;
  if (prototypes_needed) fill_zero(d_prototypes, item.classes * item.width);
  LossSums<T> sums;
  for (int64_t start = 0; start < item.query_rows; start += ld) {
    const int64_t rows = smaller(ld, item.query_rows - start);
    const T* query = item.query + start * item.width;
    scratch.distances(query, rows);
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
      alignas(64) T known[W] = {};
      const int64_t lanes = smaller(W, rows - q);
      if (item.loss) sums.add(d, ld, item.classes, lanes, item.query_labels + start + q, least, sum);
      for (int64_t lane = 0; lane < lanes; ++lane)
        known[lane] = is_class(item.query_labels[start + q + lane], item.classes);
      const Vec<T> counted = load(known);
      const Vec<T> factor = broadcast(-item.grad) / sum;
      for (int64_t n = 0; n < item.classes; ++n)
        store(g + n * ld, counted == 0 ? Vec<T>{} : load(g + n * ld) * factor);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t label = item.query_labels[start + q + lane];
        if (is_class(label, item.classes)) g[label * ld + lane] += item.grad;
      }
    }
    scratch.gradients(query, rows, item.d_query ? item.d_query + start * item.width : nullptr,
                      prototypes_needed ? d_prototypes : nullptr);
  }
  if (item.loss) sums.write(item);
  if (prototypes_needed) scratch.finish(d_prototypes);
  if (item.d_support)
    spread_to_members(d_prototypes, item.width, item.support_labels, scratch.inverse, item.support_rows, item.classes,
                      item.width, item.d_support, item.width);
}

}  // namespace fastmeta::FASTMETA_ISA
