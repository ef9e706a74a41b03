// From the gradient of a distance to the factors that its inputs' gradients are sums of (launch.h, Coefficients).
#pragma once

#include "distance_tile.h"

namespace fastmeta::cuda {

// d_query[q] = sum_n pair[q, n] * (query[q] - prototypes[n]), its sign for manhattan, or prototypes[n] alone for dot
// and cosine; cosine adds query[q] / |query[q]|^2 * sum_n self[q, n]. Likewise for prototypes, with sums over q.
// `grad` is the gradient of the distance of pair (i, j) of the tile, `index` where that pair's factors go.
template <class Tile, class A>
__device__ __forceinline__ void store_coefficients(const Coefficients& c, const Tile& tile, int i, int j, Metric metric,
                                                   A grad, int64_t index) {
  A pair = grad;
  if (metric == Metric::sqeuclidean) pair = A(2) * grad;
  if (metric == Metric::dot) pair = -grad;
  if (Tile::kEuclidean && metric == Metric::euclidean) {
    const A distance = tile.distance(i, j, metric);
    pair = distance == 0 ? A(0) : grad / distance;
  }
  if (Tile::kCosine) {
    pair = -grad * (inverse_norm(tile.qq[i]) * inverse_norm(tile.pp[j]));
    static_cast<A*>(c.self)[index] = -pair * tile.sum[i][j];
  }
  static_cast<A*>(c.pair)[index] = pair;
}

// For cosine: the tiles of the first classes and of the first queries write the norms of their queries and prototypes.
template <class Tile>
__device__ __forceinline__ void store_norms(const Coefficients& c, const Tile& tile, int64_t t, int64_t rows,
                                            int64_t classes, int64_t first_row, int64_t first_class) {
  using A = typename Tile::A;
  if (first_class == 0 && Tile::column(0) == 0)
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; ++i)
      if (first_row + Tile::row(i) < rows)
        static_cast<A*>(c.query)[t * rows + first_row + Tile::row(i)] = inverse_square(tile.qq[i]);
  if (first_row == 0 && Tile::row(0) == 0)
#pragma unroll
    for (int j = 0; j < Tile::kColumnsEach; ++j)
      if (first_class + Tile::column(j) < classes)
        static_cast<A*>(c.prototypes)[t * classes + first_class + Tile::column(j)] = inverse_square(tile.pp[j]);
}

}  // namespace fastmeta::cuda
