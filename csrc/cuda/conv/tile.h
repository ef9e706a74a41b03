// A tile of a matrix product, 64 by 64, 16 terms at once: what the convolutions' kernels multiply with.
#pragma once

#include "../device.h"

#include <fastmeta/launch_conv.h>

namespace fastmeta::cuda {

constexpr int kTile = int(kConvTile), kDepth = 16, kAcross = 16, kEach = 4, kTileThreads = 256;

template <class A>
struct alignas(16) Quad {  // read from shared memory in one piece
  A v[kEach];
};

// One operand of a tile's terms, in shared memory; four numbers more than a row has keep the banks apart.
template <class A>
struct Panel {
  Quad<A> quads[kDepth][kTile / kEach + 1];
  __device__ __forceinline__ A& at(int term, int row) { return quads[term][row / kEach].v[row % kEach]; }
};

// A thread's part of the tile: rows from `row()` on by columns from `column()` on.
template <class A>
struct Products {
  A sum[kEach][kEach];

  static __device__ __forceinline__ int row() { return int(threadIdx.x) / kAcross * kEach; }
  static __device__ __forceinline__ int column() { return int(threadIdx.x) % kAcross * kEach; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum[i][j] = 0;
    }
  }

  __device__ __forceinline__ void add(const Panel<A>& a, const Panel<A>& b) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const Quad<A> x = a.quads[d][row() / kEach], y = b.quads[d][column() / kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] += x.v[i] * y.v[j];
      }
    }
  }
};

}  // namespace fastmeta::cuda
