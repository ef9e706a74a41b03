// A block's tile of distances between queries and prototypes of one task.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

// kTileQ x kTileN distances, of which a thread owns kEachQ x kEachN: its rows lie kAcrossQ apart and its columns
// kAcrossN, so that neighbouring threads read neighbouring banks.
template <class T, Combine kCombine, int kTileQ, int kTileN, int kEachQ, int kEachN>
struct DistanceTile {
  using A = Acc<T>;
  static constexpr int kQueries = kTileQ, kClasses = kTileN, kRowsEach = kEachQ, kColumnsEach = kEachN;
  static constexpr int kAcrossN = kTileN / kEachN, kAcrossQ = kTileQ / kEachQ, kThreads = kAcrossN * kAcrossQ;
  static constexpr int kDepth = 32;
  // Blocks a multiprocessor is to hold. Said aloud, since the compiler left alone spills a register to fit one more.
  static constexpr int kBlocks = (sizeof(A) == 8 || kEachQ * kEachN > 4 ? 512 : 1024) / kThreads;
  static constexpr bool kCosine = kCombine == Combine::cosine;
  static constexpr bool kEuclidean = kCombine == Combine::squared_difference;  // or its square

  struct Shared {
    A q[kTileQ][kDepth + 1];  // + 1: rows start in different banks
    A p[kTileN][kDepth + 1];
  };

  A sum[kEachQ][kEachN];
  A qq[kEachQ], pp[kEachN];  // squared norms, for cosine alone

  static __device__ __forceinline__ int row(int i) { return int(threadIdx.x) / kAcrossN + i * kAcrossQ; }
  static __device__ __forceinline__ int column(int j) { return int(threadIdx.x) % kAcrossN + j * kAcrossN; }

  static __device__ __forceinline__ void fetch(A (*to)[kDepth + 1], int tile, const T* from, int64_t rows,
                                               int64_t width, int64_t first) {
#pragma unroll 4
    for (int i = int(threadIdx.x); i < tile * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth;
      to[r][k] = r < rows && first + k < width ? load(from + r * width + first + k) : A(0);
    }
  }

  // `rows` and `classes` say how much of the tile there is; beyond it everything is computed from zeros.
  __device__ __forceinline__ void run(Shared& s, const T* query, int64_t rows, const T* prototypes, int64_t classes,
                                      int64_t width) {
#pragma unroll
    for (int i = 0; i < kEachQ; ++i) {
      qq[i] = 0;
#pragma unroll
      for (int j = 0; j < kEachN; ++j) sum[i][j] = 0;
    }
#pragma unroll
    for (int j = 0; j < kEachN; ++j) pp[j] = 0;
    for (int64_t first = 0; first < width; first += kDepth) {
      __syncthreads();
      fetch(s.q, kTileQ, query, rows, width, first);
      fetch(s.p, kTileN, prototypes, classes, width, first);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        A q[kEachQ], p[kEachN];
#pragma unroll
        for (int i = 0; i < kEachQ; ++i) q[i] = s.q[row(i)][k];
#pragma unroll
        for (int j = 0; j < kEachN; ++j) p[j] = s.p[column(j)][k];
        if (kCosine) {
#pragma unroll
          for (int i = 0; i < kEachQ; ++i) qq[i] += q[i] * q[i];
#pragma unroll
          for (int j = 0; j < kEachN; ++j) pp[j] += p[j] * p[j];
        }
#pragma unroll
        for (int i = 0; i < kEachQ; ++i) {
#pragma unroll
          for (int j = 0; j < kEachN; ++j) {
            const A d = q[i] - p[j];
            sum[i][j] += kCombine == Combine::squared_difference    ? d * d
                         : kCombine == Combine::absolute_difference ? absolute(d)
                                                                    : q[i] * p[j];
          }
        }
      }
    }
    __syncthreads();  // the caller may use the memory again
  }

  __device__ __forceinline__ A distance(int i, int j, Metric metric) const {
    if constexpr (kEuclidean) return metric == Metric::euclidean ? sqrt(sum[i][j]) : sum[i][j];
    if constexpr (kCosine) return A(1) - sum[i][j] * (inverse_norm(qq[i]) * inverse_norm(pp[j]));
    if constexpr (kCombine == Combine::product) return -sum[i][j];
    return sum[i][j];
  }
};

// f(Constant<combine>{}) for the metric's
template <Combine kValue>
struct Constant {
  static constexpr Combine value = kValue;
};
template <class F>
void by_combine(Metric metric, const F& f) {
  switch (combine_of(metric)) {
    case Combine::squared_difference: return f(Constant<Combine::squared_difference>{});
    case Combine::product: return f(Constant<Combine::product>{});
    case Combine::absolute_difference: return f(Constant<Combine::absolute_difference>{});
    case Combine::cosine: return f(Constant<Combine::cosine>{});
  }
}

}  // namespace fastmeta::cuda
