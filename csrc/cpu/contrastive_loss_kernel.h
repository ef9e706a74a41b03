// NT-Xent of a block of rows against all rows of its task, and its gradient: scores live for one tile of them.
#pragma once

#include <fastmeta/gemm.h>
#include <fastmeta/vmath.h>

#include "carver.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct Contrast {
  const cpu::ContrastItem<T>& item;
  const int64_t rows;
  T *scaled, *scores, *most, *sums, *partner;

  explicit Contrast(const cpu::ContrastItem<T>& item) : item(item), rows(item.end - item.begin) {
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      if (pass) carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
      scaled = carver.take<T>(rows * item.width);
      scores = carver.take<T>(rows * cpu::kContrastColumns);
      most = carver.take<T>(rows);
      sums = carver.take<T>(rows);
      partner = carver.take<T>(rows);
    }
    const T* from = item.embeddings + item.begin * item.width;
    for (int64_t i = 0; i < rows * item.width; ++i) scaled[i] = from[i] * item.scale;
  }

  // f(first column, columns) with `scores` [rows, kContrastColumns] of them; columns beyond the last are padding
  template <class F>
  void tiles(const F& f) {
    for (int64_t j = 0; j < item.count; j += cpu::kContrastColumns) {
      const int64_t columns = smaller(cpu::kContrastColumns, item.count - j);
      const Right<T> right{item.packed + j * item.width, 0, larger(item.width, 1)};
      multiply<T>(rows, padded<T>(columns), item.width, scaled, item.width, 1, right, scores, cpu::kContrastColumns,
                  Finish<T>{});
      f(j, columns);
    }
  }

  // f(row, column of this tile) where the row meets column `of(row of the task)`
  template <class Of, class F>
  void meet(int64_t j, int64_t columns, const Of& of, const F& f) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = of(item.begin + i) - j;
      if (at >= 0 && at < columns) f(i, at);
    }
  }
  int64_t partner_of(int64_t i) const { return i < item.count / 2 ? i + item.count / 2 : i - item.count / 2; }
};

// lowest score that stands for no score: its exponential is 0
template <class T>
constexpr T kNoScore = sizeof(T) == 4 ? T(-1e30) : T(-1e300);

template <class T>
void contrast(const cpu::ContrastItem<T>& item) {
  constexpr int W = kWidth<T>;
  Contrast<T> c(item);
  for (int64_t i = 0; i < c.rows; ++i) {
    c.most[i] = kNoScore<T>;
    c.sums[i] = c.partner[i] = 0;
  }
  c.tiles([&](int64_t j, int64_t columns) {
    c.meet(j, columns, [&](int64_t i) { return c.partner_of(i); },
           [&](int64_t i, int64_t at) { c.partner[i] = c.scores[i * cpu::kContrastColumns + at]; });
    c.meet(j, columns, [](int64_t i) { return i; },
           [&](int64_t i, int64_t at) { c.scores[i * cpu::kContrastColumns + at] = kNoScore<T>; });
    for (int64_t i = 0; i < c.rows; ++i) {
      T* s = c.scores + i * cpu::kContrastColumns;
      for (int64_t k = columns; k < padded<T>(columns); ++k) s[k] = kNoScore<T>;
      Vec<T> high = load(s);
      for (int64_t k = W; k < columns; k += W) high = maximum(high, load(s + k));
      T highest = c.most[i];
      alignas(64) T lanes[W];
      store(lanes, high);
      for (int lane = 0; lane < W; ++lane) highest = lanes[lane] > highest ? lanes[lane] : highest;
      Vec<T> sum = {};
      for (int64_t k = 0; k < columns; k += W) sum += exponential<T>(load(s + k) - highest);
      const T kept = T(exponential<T>(broadcast(c.most[i] - highest))[0]);
      c.sums[i] = c.sums[i] * kept + sum_of_lanes<T>(sum);
      c.most[i] = highest;
    }
  });
  T total = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    const T log_sum = T(logarithm(broadcast(c.sums[i]))[0]);
    item.log_sums[item.begin + i] = c.most[i] + log_sum;
    total += (c.most[i] - c.partner[i]) + log_sum;
  }
  *item.loss = total;
}

// rows [begin, end) of d = factor * sum_j (p[i, j] + p[j, i] - 2 [j = partner(i)]) z_j, where p is the softmax
template <class T>
void contrast_gradient(const cpu::ContrastItem<T>& item) {
  constexpr int W = kWidth<T>;
  Contrast<T> c(item);
  T* out = item.d_embeddings + item.begin * item.width;
  c.tiles([&](int64_t j, int64_t columns) {
    for (int64_t i = 0; i < c.rows; ++i) {
      T* s = c.scores + i * cpu::kContrastColumns;
      const T own = item.log_sums[item.begin + i];
      for (int64_t k = 0; k < columns; k += W) {
        const Vec<T> score = load(s + k), other = load_first(item.log_sums + j + k, smaller(W, columns - k));
        store(s + k, item.factor * (exponential<T>(score - own) + exponential<T>(score - other)));
      }
    }
    c.meet(j, columns, [](int64_t i) { return i; },
           [&](int64_t i, int64_t at) { c.scores[i * cpu::kContrastColumns + at] = 0; });
    c.meet(j, columns, [&](int64_t i) { return c.partner_of(i); },
           [&](int64_t i, int64_t at) { c.scores[i * cpu::kContrastColumns + at] -= 2 * item.factor; });
    Finish<T> finish;
    finish.add = j > 0;
    multiply<T>(c.rows, item.width, columns, c.scores, cpu::kContrastColumns, 1,
                Right<T>{item.embeddings + j * item.width, item.width}, out, item.width, finish);
  });
}

}  // namespace fastmeta::FASTMETA_ISA
