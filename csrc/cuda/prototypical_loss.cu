// The prototypical loss of every task and its gradient: distances live in one tile at a time.
#include "distance_coefficients.h"

namespace fastmeta::cuda {
namespace {

template <class T, Combine kCombine>
using LossTile = DistanceTile<T, kCombine, int(kQueryTile), 16, 4, 1>;

// What a query keeps of the distances seen so far: its softmax is formed on the way (Milakov and Gimelshein, 2018).
template <class A>
struct Seen {
  A most = -A(INFINITY), sum = 0, right = 0;  // the largest -distance, the sum of exp(-distance - most), the label's
  bool hit = false;                           // whether the first of the nearest is the label's
  bool unordered = false;                     // some distance is NaN: nothing is nearest

  __device__ __forceinline__ void add(A distance, bool first, bool is_label) {
    const A logit = -distance;
    if (first || logit > most) hit = is_label;
    if (logit > most) {
      sum = sum * exp(most - logit) + exp(logit - logit);  // 1, or NaN: infinity less infinity
      most = logit;
    } else if (logit != -A(INFINITY)) {
      sum += exp(logit - most);  // NaN too gets here, and stays
    }
    unordered = unordered || distance != distance;
    if (is_label) right = distance;
  }
  // Large distances cancel exactly before the logarithm, which may be small, is added. NaN where all are infinite.
  __device__ __forceinline__ A loss() const { return (right + most) + log(sum); }
  __device__ __forceinline__ bool hits() const { return hit && !unordered; }
};

// A block per tile of queries: sums loss and hits of its queries into `sums`, and, where `log_sums` is given, writes
// the queries' softmax instead: the largest -distance, and the logarithm of the sum.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) loss_kernel(PrototypicalLoss p, void* log_sums) {
  using A = Acc<T>;
  __shared__ typename Tile::Shared shared;
  __shared__ A distances[Tile::kQueries][Tile::kClasses + 1];
  const int64_t tiles = divide_up<int64_t>(p.rows, Tile::kQueries);
  FM_EACH(t, x, p.tasks) FM_EACH(query_tile, y, tiles) {
    const int64_t first = query_tile * Tile::kQueries;
    const int64_t q = t * p.rows + first + threadIdx.x;
    const bool mine = threadIdx.x < Tile::kQueries && first + threadIdx.x < p.rows;
    const int label = mine ? int(p.query_labels[q]) : -1;
    Seen<A> seen;
    for (int64_t n = 0; n < p.classes; n += Tile::kClasses) {
      Tile tile;
      tile.run(shared, static_cast<const T*>(p.query) + (t * p.rows + first) * p.width, p.rows - first,
               static_cast<const T*>(p.prototypes) + (t * p.classes + n) * p.width, p.classes - n, p.width);
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColumnsEach; ++j)
          distances[Tile::row(i)][Tile::column(j)] = tile.distance(i, j, p.metric);
      }
      __syncthreads();
      if (mine) {
        const int classes = int(smaller<int64_t>(Tile::kClasses, p.classes - n));
        for (int j = 0; j < classes; ++j) seen.add(distances[threadIdx.x][j], n + j == 0, int(n) + j == label);
      }
      __syncthreads();
    }
    if (log_sums) {
      if (mine) {
        static_cast<A*>(log_sums)[2 * q] = seen.most;
        static_cast<A*>(log_sums)[2 * q + 1] = log(seen.sum);
      }
      continue;
    }
    if (threadIdx.x < Tile::kQueries) {
      distances[threadIdx.x][0] = mine ? seen.loss() : A(0);
      distances[threadIdx.x][1] = mine && seen.hits() ? A(1) : A(0);
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      A sum = 0;
      for (int i = 0; i < Tile::kQueries; ++i) sum += distances[i][threadIdx.x];
      static_cast<A*>(p.sums)[2 * (t * tiles + query_tile) + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

constexpr int kMeanThreads = 128;

// A thread per task adds the tiles up. No queries: 0 / 0, as the mean of nothing.
template <class T>
__global__ void __launch_bounds__(kMeanThreads) mean_kernel(PrototypicalLoss p, int64_t tiles) {
  using A = Acc<T>;
  FM_EACH(tile, x, divide_up<int64_t>(p.tasks, kMeanThreads)) {
    const int64_t t = tile * kMeanThreads + threadIdx.x;
    if (t >= p.tasks) continue;
    const A* sums = static_cast<const A*>(p.sums) + 2 * t * tiles;
    A loss = 0, hits = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      loss += sums[2 * i];
      hits += sums[2 * i + 1];
    }
    store(static_cast<T*>(p.loss) + t, loss / A(p.rows));
    store(static_cast<T*>(p.accuracy) + t, hits / A(p.rows));
  }
}

// d loss / d distance = (1[n is the label] - softmax_n(-distance)) / rows, turned into coefficients. Task t of the
// scratch is task first_task + t.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    loss_coefficients_kernel(PrototypicalLossBwd b, int64_t first_task, int64_t tasks) {
  using A = Acc<T>;
  __shared__ typename Tile::Shared shared;
  const PrototypicalLoss& p = b.forward;
  FM_EACH(local, x, tasks) FM_EACH(row_tile, y, divide_up<int64_t>(p.rows, Tile::kQueries))
  FM_EACH(class_tile, z, divide_up<int64_t>(p.classes, Tile::kClasses)) {
    const int64_t t = first_task + local, row = row_tile * Tile::kQueries, n = class_tile * Tile::kClasses;
    Tile tile;
    tile.run(shared, static_cast<const T*>(p.query) + (t * p.rows + row) * p.width, p.rows - row,
             static_cast<const T*>(p.prototypes) + (t * p.classes + n) * p.width, p.classes - n, p.width);
    if (Tile::kCosine) store_norms(b.coefficients, tile, local, p.rows, p.classes, row, n);
    const A grad = load(static_cast<const T*>(b.grad_loss) + t) / A(p.rows);
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; ++i) {
      const int64_t q = row + Tile::row(i);
      if (q >= p.rows) continue;
      const int64_t label = p.query_labels[t * p.rows + q];
      const A* softmax = static_cast<const A*>(b.log_sums) + 2 * (t * p.rows + q);
      const A most = softmax[0], log_sum = softmax[1];
#pragma unroll
      for (int j = 0; j < Tile::kColumnsEach; ++j) {
        const int64_t c = n + Tile::column(j);
        if (c >= p.classes) continue;
        const A probability = exp((-tile.distance(i, j, p.metric) - most) - log_sum);
        store_coefficients(b.coefficients, tile, i, j, p.metric, grad * ((c == label ? A(1) : A(0)) - probability),
                           (local * p.rows + q) * p.classes + c);
      }
    }
  }
}

template <class T, Combine kCombine>
void launch_loss(const PrototypicalLoss& p, void* log_sums, void* stream) {
  using Tile = LossTile<T, kCombine>;
  launch(loss_kernel<T, Tile>, {p.tasks, query_tiles(p.rows)}, Tile::kThreads, 0, stream, p, log_sums);
}

template <class T>
const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}

ClassPrototypes class_prototypes(const PrototypicalLoss& p) {
  return {p.support, p.support_labels, p.prototypes, p.tasks, p.support_rows, p.classes, p.width};
}

template <class T>
void launch_loss_bwd(Dtype dtype, const PrototypicalLossBwd& b, void* stream) {
  const PrototypicalLoss& p = b.forward;
  for (int64_t first = 0; first < p.tasks; first += b.chunk) {
    const int64_t tasks = smaller(b.chunk, p.tasks - first);
    const int64_t q = first * p.rows * p.width, c = first * p.classes * p.width;
    by_combine(p.metric, [&](auto combine) {
      using Tile = LossTile<T, decltype(combine)::value>;
      const Grid grid{tasks, query_tiles(p.rows), divide_up<int64_t>(p.classes, Tile::kClasses)};
      launch(loss_coefficients_kernel<T, Tile>, grid, Tile::kThreads, 0, stream, b, first, tasks);
    });
    PairwiseDistanceBwd bwd{};
    bwd.forward = {at<T>(p.query, q), at<T>(static_cast<const void*>(p.prototypes), c), nullptr, tasks, p.rows,
                   p.classes,         p.width,                                          p.metric};
    bwd.coefficients = b.coefficients;
    bwd.d_query = at<T>(b.d_query, q);
    bwd.d_prototypes = at<T>(b.d_prototypes, c);
    launch_pairwise_distance_bwd(dtype, bwd, stream);
  }
}

}  // namespace

void launch_prototypical_loss(Dtype dtype, const PrototypicalLoss& p, void* stream) {
  launch_class_prototypes(dtype, class_prototypes(p), stream);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    by_combine(p.metric, [&](auto combine) { launch_loss<T, decltype(combine)::value>(p, nullptr, stream); });
    launch(mean_kernel<T>, {divide_up<int64_t>(p.tasks, kMeanThreads)}, kMeanThreads, 0, stream, p,
           query_tiles(p.rows));
  });
}

void launch_prototypical_loss_bwd(Dtype dtype, const PrototypicalLossBwd& b, void* stream) {
  const PrototypicalLoss& p = b.forward;
  if (!b.d_query && !b.d_support) return;
  launch_class_prototypes(dtype, class_prototypes(p), stream);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    by_combine(p.metric, [&](auto combine) { launch_loss<T, decltype(combine)::value>(p, b.log_sums, stream); });
    launch_loss_bwd<T>(dtype, b, stream);
  });
  if (!b.d_support) return;
  const ClassPrototypes c{b.d_prototypes, p.support_labels, b.d_support, p.tasks, p.support_rows, p.classes, p.width};
  launch_class_prototypes_bwd(dtype, c, stream);
}

}  // namespace fastmeta::cuda
