// Gradients of distances from their coefficients: one kernel for either side.
#pragma once

#include <type_traits>

#include "distance_tile.h"

namespace fastmeta::cuda {

// out[t, r] = sum_o pair[t, r, o] * f(x[t, r], y[t, o]) (+ x[t, r] * inverse[t, r] * sum_o self[t, r, o] for cosine).
// For the gradient of the prototypes rows and others change places, which two strides say.
template <class C>
struct GradientSide {
  const void* x;
  const void* y;
  void* out;
  const C* pair;
  const C* self;
  const C* inverse;
  int64_t tasks, rows, others, width, row_stride, other_stride;
  double factor;  // what the pairs are still to be multiplied by
};

// A block: kRows rows by kColumns features; a thread: kEachRow rows by two features. The sum over the others runs in
// order in each thread, so the same inputs give the same bits.
struct GradientTile {
  static constexpr int kRows = 16, kColumns = 64, kOthers = 32, kLanes = 32, kThreads = 128;
  static constexpr int kAcross = kThreads / kLanes, kEachRow = kRows / kAcross;
};

template <class T, class C, Combine kCombine>
__global__ void __launch_bounds__(GradientTile::kThreads, sizeof(Acc<T>) == 8 ? 4 : 5)
    distance_gradient_kernel(GradientSide<C> p) {
  using A = Acc<T>;
  using G = GradientTile;
  constexpr bool kCosine = kCombine == Combine::cosine;
  __shared__ A pair[G::kRows][G::kOthers + 1];
  __shared__ A self[kCosine ? G::kRows : 1][kCosine ? G::kOthers + 1 : 1];
  __shared__ A y[G::kOthers][G::kColumns];
  const int lane = int(threadIdx.x) % G::kLanes, across = int(threadIdx.x) / G::kLanes;
  const A factor = A(p.factor);
  FM_EACH(t, x, p.tasks) FM_EACH(row_tile, y, divide_up<int64_t>(p.rows, G::kRows))
  FM_EACH(column_tile, z, divide_up<int64_t>(p.width, G::kColumns)) {
    const int64_t first_row = row_tile * G::kRows, first_column = column_tile * G::kColumns;
    const T* from = static_cast<const T*>(p.y) + t * p.others * p.width + first_column;
    const int64_t pairs = t * p.rows * p.others + first_row * p.row_stride;
    A x[G::kEachRow][2], sum[G::kEachRow][2], self_sum[G::kEachRow];
#pragma unroll
    for (int i = 0; i < G::kEachRow; ++i) {
      self_sum[i] = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = first_row + across + i * G::kAcross, column = first_column + lane + j * G::kLanes;
        const bool inside = row < p.rows && column < p.width;
        x[i][j] = inside ? load(static_cast<const T*>(p.x) + (t * p.rows + row) * p.width + column) : A(0);
        sum[i][j] = 0;
      }
    }
    for (int64_t first = 0; first < p.others; first += G::kOthers) {
      const int others = int(smaller<int64_t>(G::kOthers, p.others - first));
      __syncthreads();
#pragma unroll 2
      for (int i = int(threadIdx.x); i < G::kRows * G::kOthers; i += G::kThreads) {
        const bool along_others = p.other_stride == 1;  // neighbouring threads read neighbours in memory
        const int r = along_others ? i / G::kOthers : i % G::kRows, o = along_others ? i % G::kOthers : i / G::kRows;
        const bool inside = first_row + r < p.rows && o < others;
        const int64_t at = pairs + r * p.row_stride + (first + o) * p.other_stride;
        pair[r][o] = inside ? factor * A(load(p.pair + at)) : A(0);
        if constexpr (kCosine) self[r][o] = inside ? factor * A(load(p.self + at)) : A(0);
      }
#pragma unroll 4
      for (int i = int(threadIdx.x); i < G::kOthers * G::kColumns; i += G::kThreads) {
        const int o = i / G::kColumns, column = i % G::kColumns;
        const bool inside = o < others && first_column + column < p.width;
        y[o][column] = inside ? load(from + (first + o) * p.width + column) : A(0);
      }
      __syncthreads();
#pragma unroll 2
      for (int o = 0; o < others; ++o) {
        const A y0 = y[o][lane], y1 = y[o][lane + G::kLanes];
#pragma unroll
        for (int i = 0; i < G::kEachRow; ++i) {
          const A c = pair[across + i * G::kAcross][o];
          if constexpr (kCombine == Combine::squared_difference) {
            sum[i][0] += c * (x[i][0] - y0);
            sum[i][1] += c * (x[i][1] - y1);
          } else if constexpr (kCombine == Combine::absolute_difference) {
            sum[i][0] += c * sign(x[i][0] - y0);
            sum[i][1] += c * sign(x[i][1] - y1);
          } else {
            sum[i][0] += c * y0;
            sum[i][1] += c * y1;
          }
          if constexpr (kCosine) self_sum[i] += self[across + i * G::kAcross][o];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < G::kEachRow; ++i) {
      const int64_t row = first_row + across + i * G::kAcross;
      if (row >= p.rows) continue;
      A inverse = 0;
      if constexpr (kCosine)
        if (p.others > 0) inverse = load(p.inverse + t * p.rows + row);  // with no others nobody wrote it
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t column = first_column + lane + j * G::kLanes;
        if (column < p.width)
          store(static_cast<T*>(p.out) + (t * p.rows + row) * p.width + column,
                sum[i][j] + (kCosine ? x[i][j] * inverse * self_sum[i] : A(0)));
      }
    }
  }
}

template <class T, class C>
void launch_gradient_side(Metric metric, const GradientSide<C>& p, void* stream) {
  const Grid grid{p.tasks, divide_up<int64_t>(p.rows, GradientTile::kRows),
                  divide_up<int64_t>(p.width, GradientTile::kColumns)};
  by_combine(metric, [&](auto combine) {
    constexpr Combine kCombine = decltype(combine)::value;
    // cosine always comes with coefficients in the accumulation type
    if constexpr (std::is_same_v<C, Acc<T>> || kCombine != Combine::cosine)
      launch(distance_gradient_kernel<T, C, kCombine>, grid, GradientTile::kThreads, 0, stream, p);
  });
}

// Both sides, as far as they are wanted.
template <class T, class C>
void launch_gradients(const PairwiseDistanceBwd& b, const C* pair, double factor, void* stream) {
  const PairwiseDistance& p = b.forward;
  const C* self = static_cast<const C*>(b.coefficients.self);
  const C* query_norms = static_cast<const C*>(b.coefficients.query);
  const C* prototype_norms = static_cast<const C*>(b.coefficients.prototypes);
  const GradientSide<C> query{p.query, p.prototypes, b.d_query, pair,      self, query_norms, p.tasks,
                              p.rows,  p.classes,    p.width,   p.classes, 1,    factor};
  if (b.d_query) launch_gradient_side<T, C>(p.metric, query, stream);
  const GradientSide<C> prototypes{p.prototypes, p.query, b.d_prototypes, pair, self,      prototype_norms, p.tasks,
                                   p.classes,    p.rows,  p.width,        1,    p.classes, factor};
  if (b.d_prototypes) launch_gradient_side<T, C>(p.metric, prototypes, stream);
}

}  // namespace fastmeta::cuda
