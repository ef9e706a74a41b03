// Distances of every query to every prototype of its task, and the gradients.
#include "distance_coefficients.h"
#include "distance_gradient.h"

namespace fastmeta::cuda {
namespace {

// Few classes (the usual case) leave a wide tile idle; many read the queries less often from it.
template <class T, Combine kCombine>
using NarrowTile = DistanceTile<T, kCombine, 64, 8, 4, 1>;
template <class T, Combine kCombine>
using WideTile = DistanceTile<T, kCombine, 64, 64, 4, 4>;
constexpr int64_t kNarrowClasses = 16;

template <class Tile>
Grid tiles(const PairwiseDistance& p) {
  return {p.tasks, divide_up<int64_t>(p.rows, Tile::kQueries), divide_up<int64_t>(p.classes, Tile::kClasses)};
}

// f(tile, task, first row, first class) for each tile of distances that falls to this block
template <class T, class Tile, class F>
__device__ __forceinline__ void for_each_tile(const PairwiseDistance& p, typename Tile::Shared& shared, const F& f) {
  FM_EACH(t, x, p.tasks) FM_EACH(row_tile, y, divide_up<int64_t>(p.rows, Tile::kQueries))
  FM_EACH(class_tile, z, divide_up<int64_t>(p.classes, Tile::kClasses)) {
    const int64_t row = row_tile * Tile::kQueries, label = class_tile * Tile::kClasses;
    Tile tile;
    tile.run(shared, static_cast<const T*>(p.query) + (t * p.rows + row) * p.width, p.rows - row,
             static_cast<const T*>(p.prototypes) + (t * p.classes + label) * p.width, p.classes - label, p.width);
    f(tile, t, row, label);
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) pairwise_distance_kernel(PairwiseDistance p) {
  __shared__ typename Tile::Shared shared;
  for_each_tile<T, Tile>(p, shared, [&](const Tile& tile, int64_t t, int64_t row, int64_t label) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnsEach; ++j) {
        const int64_t q = row + Tile::row(i), n = label + Tile::column(j);
        if (q < p.rows && n < p.classes)
          store(static_cast<T*>(p.out) + (t * p.rows + q) * p.classes + n, tile.distance(i, j, p.metric));
      }
    }
  });
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) distance_coefficients_kernel(PairwiseDistanceBwd b) {
  __shared__ typename Tile::Shared shared;
  const PairwiseDistance& p = b.forward;
  for_each_tile<T, Tile>(p, shared, [&](const Tile& tile, int64_t t, int64_t row, int64_t label) {
    if (Tile::kCosine) store_norms(b.coefficients, tile, t, p.rows, p.classes, row, label);
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnsEach; ++j) {
        const int64_t q = row + Tile::row(i), n = label + Tile::column(j);
        if (q >= p.rows || n >= p.classes) continue;
        const int64_t index = (t * p.rows + q) * p.classes + n;
        store_coefficients(b.coefficients, tile, i, j, p.metric, load(static_cast<const T*>(b.grad) + index), index);
      }
    }
  });
}

template <class T, Combine kCombine>
void launch_coefficients(const PairwiseDistanceBwd& b, void* stream) {
  using Tile = NarrowTile<T, kCombine>;
  launch(distance_coefficients_kernel<T, Tile>, tiles<Tile>(b.forward), Tile::kThreads, 0, stream, b);
}

}  // namespace

void launch_pairwise_distance(Dtype dtype, const PairwiseDistance& p, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    by_combine(p.metric, [&](auto combine) {
      constexpr Combine kCombine = decltype(combine)::value;
      using Narrow = NarrowTile<T, kCombine>;
      using Wide = WideTile<T, kCombine>;
      if (p.classes <= kNarrowClasses)
        launch(pairwise_distance_kernel<T, Narrow>, tiles<Narrow>(p), Narrow::kThreads, 0, stream, p);
      else
        launch(pairwise_distance_kernel<T, Wide>, tiles<Wide>(p), Wide::kThreads, 0, stream, p);
    });
  });
}

void launch_pairwise_distance_bwd(Dtype dtype, const PairwiseDistanceBwd& b, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Metric metric = b.forward.metric;
    if (b.grad && !needs_coefficients(metric)) {
      const double factor = metric == Metric::sqeuclidean ? 2 : metric == Metric::dot ? -1 : 1;
      return launch_gradients<T, T>(b, static_cast<const T*>(b.grad), factor, stream);
    }
    if (b.grad && metric == Metric::euclidean) launch_coefficients<T, Combine::squared_difference>(b, stream);
    if (b.grad && metric == Metric::cosine) launch_coefficients<T, Combine::cosine>(b, stream);
    launch_gradients<T, Acc<T>>(b, static_cast<const Acc<T>*>(b.coefficients.pair), 1, stream);
  });
}

}  // namespace fastmeta::cuda
