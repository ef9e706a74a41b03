// One tiled matrix product for every layer and its gradients: any strides, batches, sums over tasks, fused epilogue.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

// out[m, n] = epilogue(sum over steps and k of a[m, k] * b[n, k]). A step is a task to be summed over, or a piece of a
// long k: all steps but the last have k terms, all together k_total.
struct Gemm {
  const void* a;
  const void* b;  // nullptr: ones, for sums of a
  void* out;
  void* sums;  // where groups > 1: [groups, m, n] in the accumulation type, added up by a second kernel
  int64_t m, n, k, k_total, steps, steps_each, groups, batches;
  int64_t a_m, a_k, a_step, a_batch, b_n, b_k, b_step, b_batch;
  // the epilogue, without groups: plus bias, `pre` gets that, then the activation; or times the derivative at `value`
  const void* bias;
  const void* value;
  void* pre;
  int64_t bias_batch;
  Activation activation;
};

constexpr int kGemmTile = 64, kGemmDepth = 16, kGemmAcross = 16, kGemmEach = 4, kGemmThreads = 256;

template <class T>
__device__ __forceinline__ void gemm_fetch(Acc<T> (*to)[kGemmTile + 1], const T* from, int64_t rows, int64_t row_stride,
                                           int64_t terms, int64_t term_stride) {
  const bool along_terms = term_stride == 1;  // neighbouring threads read neighbours in memory
#pragma unroll
  for (int i = int(threadIdx.x); i < kGemmTile * kGemmDepth; i += kGemmThreads) {
    const int r = along_terms ? i / kGemmDepth : i % kGemmTile, k = along_terms ? i % kGemmDepth : i / kGemmTile;
    const bool inside = r < rows && k < terms;
    to[k][r] = inside ? from ? load(from + r * row_stride + k * term_stride) : Acc<T>(1) : Acc<T>(0);
  }
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_kernel(Gemm p) {
  using A = Acc<T>;
  __shared__ A a[kGemmDepth][kGemmTile + 1], b[kGemmDepth][kGemmTile + 1];
  const int tx = int(threadIdx.x) % kGemmAcross, ty = int(threadIdx.x) / kGemmAcross;
  FM_EACH(unit, x, p.groups > 1 ? p.groups : p.batches) FM_EACH(m_tile, y, divide_up<int64_t>(p.m, kGemmTile))
  FM_EACH(n_tile, z, divide_up<int64_t>(p.n, kGemmTile)) {
    const int64_t batch = p.groups > 1 ? 0 : unit, group = p.groups > 1 ? unit : 0;
    const int64_t m = m_tile * kGemmTile, n = n_tile * kGemmTile;
    const T* from_a = static_cast<const T*>(p.a) + batch * p.a_batch + m * p.a_m;
    const T* from_b = p.b ? static_cast<const T*>(p.b) + batch * p.b_batch + n * p.b_n : nullptr;
    A sum[kGemmEach][kGemmEach] = {};
    const int64_t end = smaller(p.steps, (group + 1) * p.steps_each);
    for (int64_t step = group * p.steps_each; step < end; ++step) {
      const int64_t terms = smaller(p.k, p.k_total - step * p.k);
      for (int64_t k = 0; k < terms; k += kGemmDepth) {
        __syncthreads();
        gemm_fetch<T>(a, from_a + step * p.a_step + k * p.a_k, p.m - m, p.a_m, terms - k, p.a_k);
        gemm_fetch<T>(b, from_b ? from_b + step * p.b_step + k * p.b_k : nullptr, p.n - n, p.b_n, terms - k, p.b_k);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kGemmDepth; ++d) {
          A x[kGemmEach], y[kGemmEach];
#pragma unroll
          for (int i = 0; i < kGemmEach; ++i) {
            x[i] = a[d][ty + i * kGemmAcross];
            y[i] = b[d][tx + i * kGemmAcross];
          }
#pragma unroll
          for (int i = 0; i < kGemmEach; ++i) {
#pragma unroll
            for (int j = 0; j < kGemmEach; ++j) sum[i][j] += x[i] * y[j];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGemmEach; ++i) {
#pragma unroll
      for (int j = 0; j < kGemmEach; ++j) {
        const int64_t row = m + ty + i * kGemmAcross, column = n + tx + j * kGemmAcross;
        if (row >= p.m || column >= p.n) continue;
        const int64_t at = (unit * p.m + row) * p.n + column;
        A v = sum[i][j];
        if (p.groups > 1) {
          static_cast<A*>(p.sums)[at] = v;
          continue;
        }
        if (p.bias) v += load(static_cast<const T*>(p.bias) + batch * p.bias_batch + column);
        if (p.pre) store(static_cast<T*>(p.pre) + at, v);
        if (p.value)
          v *= derivative(p.activation, load(static_cast<const T*>(p.value) + at));
        else
          v = activate(p.activation, v);
        store(static_cast<T*>(p.out) + at, v);
      }
    }
  }
}

template <class T>
void launch_gemm(const Gemm& p, void* stream) {
  const Grid grid{p.groups > 1 ? p.groups : p.batches, divide_up<int64_t>(p.m, kGemmTile),
                  divide_up<int64_t>(p.n, kGemmTile)};
  launch(gemm_kernel<T>, grid, kGemmThreads, 0, stream, p);
}

}  // namespace fastmeta::cuda
