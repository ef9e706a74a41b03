// A whole small perceptron in one kernel: a block runs all layers for some rows of one task, hidden values stay on
// chip.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

constexpr int kFusedLayers = 8, kFusedRows = 32, kFusedThreads = 256;
constexpr int kFusedLanes = 32, kFusedEach = kFusedRows * kFusedLanes / kFusedThreads;  // rows a thread has
constexpr int64_t kFusedBytes = 64 << 10;  // what every GPU since compute capability 7.5 gives a block

struct FusedMlp {
  const void* weights[kFusedLayers];
  const void* biases[kFusedLayers];  // nullptr: none
  int64_t weight_task[kFusedLayers], bias_task[kFusedLayers];
  int widths[kFusedLayers + 1];
  const void* x;
  void* out;
  int64_t tasks, rows, x_task;
  int layers, widest, weight_size;  // of a block's rows of values, and of the largest layer as it is kept on chip
  Activation activation;
};

// Rows of weights start in different banks.
inline int64_t kept(int64_t inputs, int64_t outputs) { return outputs * (inputs | 1); }

template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2) fused_mlp_kernel(FusedMlp p) {
  using A = Acc<T>;
  FM_DYNAMIC_SHARED(memory);
  A* weights = reinterpret_cast<A*>(memory);
  A* values = weights + p.weight_size;
  const int lane = int(threadIdx.x) % kFusedLanes, first_row = int(threadIdx.x) / kFusedLanes * kFusedEach;
  FM_EACH(t, x, p.tasks) FM_EACH(tile, y, divide_up<int64_t>(p.rows, kFusedRows)) {
    const int64_t start = tile * kFusedRows;
    const int rows = int(smaller<int64_t>(kFusedRows, p.rows - start));
    A* from = values;
    A* to = values + kFusedRows * p.widest;
    __syncthreads();
    const T* x = static_cast<const T*>(p.x) + t * p.x_task + start * p.widths[0];
    for (int i = int(threadIdx.x); i < kFusedRows * p.widths[0]; i += kFusedThreads)
      from[i] = i < rows * p.widths[0] ? load(x + i) : A(0);
    for (int l = 0; l < p.layers; ++l) {
      const int inputs = p.widths[l], outputs = p.widths[l + 1], stride = inputs | 1;
      const T* w = static_cast<const T*>(p.weights[l]) + t * p.weight_task[l];
      const T* bias = p.biases[l] ? static_cast<const T*>(p.biases[l]) + t * p.bias_task[l] : nullptr;
      const bool last = l + 1 == p.layers;
      __syncthreads();
      for (int o = int(threadIdx.x) / kFusedLanes; o < outputs; o += kFusedThreads / kFusedLanes)
        for (int i = lane; i < inputs; i += kFusedLanes) weights[o * stride + i] = load(w + o * inputs + i);
      __syncthreads();
      for (int first = 0; first < outputs; first += 2 * kFusedLanes) {
        // lanes beyond the last output compute it again, and do not write
        const int o[2] = {first + lane, first + lane + kFusedLanes};
        const A* w0 = weights + smaller(o[0], outputs - 1) * stride;
        const A* w1 = weights + smaller(o[1], outputs - 1) * stride;
        A sum[kFusedEach][2] = {};
#pragma unroll 4
        for (int i = 0; i < inputs; ++i) {
          const A a = w0[i], b = w1[i];
#pragma unroll
          for (int r = 0; r < kFusedEach; ++r) {
            const A v = from[(first_row + r) * inputs + i];
            sum[r][0] += v * a;
            sum[r][1] += v * b;
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (o[j] >= outputs) continue;
          const A add = bias ? load(bias + o[j]) : A(0);
#pragma unroll
          for (int r = 0; r < kFusedEach; ++r) {
            const int row = first_row + r;
            const A v = sum[r][j] + add;
            if (!last)
              to[row * outputs + o[j]] = activate(p.activation, v);
            else if (row < rows)
              store(static_cast<T*>(p.out) + (t * p.rows + start + row) * outputs + o[j], v);
          }
        }
      }
      A* swap = from;
      from = to;
      to = swap;
    }
  }
}

template <class T>
bool fits_on_chip(const FunctionalMlp& p) {
  if (p.layers > kFusedLayers) return false;
  int64_t weights = 0, widest = 0;
  for (int64_t l = 0; l < p.layers; ++l) {
    if (p.widths[l] > 4096 || p.widths[l + 1] > 4096) return false;
    const int64_t size = kept(p.widths[l], p.widths[l + 1]);
    weights = size > weights ? size : weights;
    widest = p.widths[l] > widest ? p.widths[l] : widest;
  }
  return (weights + 2 * kFusedRows * widest) * int64_t(sizeof(Acc<T>)) <= kFusedBytes;
}

template <class T>
void launch_fused_mlp(const FunctionalMlp& p, T* out, void* stream) {
  FusedMlp f{};
  for (int64_t l = 0; l < p.layers; ++l) {
    f.weights[l] = p.weights[l];
    f.weight_task[l] = p.weight_task[l];
    f.biases[l] = p.biases ? p.biases[l] : nullptr;
    f.bias_task[l] = p.biases ? p.bias_task[l] : 0;
    const int64_t size = kept(p.widths[l], p.widths[l + 1]);
    f.weight_size = int(size > f.weight_size ? size : f.weight_size);
    f.widest = int(p.widths[l] > f.widest ? p.widths[l] : f.widest);
  }
  for (int64_t l = 0; l <= p.layers; ++l) f.widths[l] = int(p.widths[l]);
  if (p.widths[p.layers] == 0) return;
  f.x = p.x;
  f.out = out;
  f.tasks = p.tasks;
  f.rows = p.rows;
  f.x_task = p.x_task;
  f.layers = int(p.layers);
  f.activation = p.activation;
  const size_t bytes = size_t(f.weight_size + 2 * kFusedRows * f.widest) * sizeof(Acc<T>);
#ifndef FASTMETA_HOST
  if (bytes > 48 << 10)  // more than that must be asked for
    cudaFuncSetAttribute(fused_mlp_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
#endif
  launch(fused_mlp_kernel<T>, {p.tasks, divide_up<int64_t>(p.rows, kFusedRows)}, kFusedThreads, bytes, stream, f);
}

}  // namespace fastmeta::cuda
