// Gradients of inputs that all tasks share: each block sums up its own tasks, then blocks are summed up in their order.
#pragma once

#include "device.h"

#include <fastmeta/launch_inner_loop.h>

namespace fastmeta::cuda {

// Where shared gradients lie in a block's sums, one behind the other.
struct InnerSums {
  static constexpr int kMost = 4 * kInnerLayers + 1;
  void* out[kMost];
  int64_t begin[kMost + 1];
  int count = 0;
  int64_t size = 0;
};

// Lists the gradients to be summed; with `partials`, the first block's sums, also turns them over to those.
inline InnerSums shared_gradients(InnerLoop& p, void* partials, int64_t element) {
  InnerSums s{};
  const auto add = [&](InnerOutput& o, int64_t size) {
    if (!o.data || o.task != 0) return;
    s.out[s.count] = o.data;
    s.begin[s.count++] = s.size;
    if (partials) o.data = static_cast<char*>(partials) + s.size * element;
    s.size += size;
    s.begin[s.count] = s.size;
  };
  for (int l = p.first; l < p.layers; ++l) {
    InnerLayer& a = p.layer[l];
    const int64_t weights = int64_t(a.out) * a.in, biases = a.out;
    add(a.d_weight, weights);
    add(a.d_bias, biases);
    add(a.d_weight_rate, weights);
    add(a.d_bias_rate, biases);
  }
  add(p.d_rates, int64_t(p.steps) * p.layers);
  return s;
}
inline InnerSums shared_gradients(InnerLoop& p) { return shared_gradients(p, nullptr, 0); }
template <class A>
InnerSums shared_gradients(InnerLoop& p, A* partials) {
  return shared_gradients(p, partials, sizeof(A));
}

constexpr int kSumAcross = 16, kSumParts = 32, kSumThreads = kSumAcross * kSumParts;

// A block sums kSumAcross elements; its kSumParts rows of threads share the blocks' sums between them.
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    inner_sums_kernel(const __grid_constant__ InnerSums s, const A* partials, int64_t blocks) {
  __shared__ A parts[kSumParts][kSumAcross + 1];
  const int across = int(threadIdx.x) % kSumAcross, part = int(threadIdx.x) / kSumAcross;
  FM_EACH(tile, x, divide_up<int64_t>(s.size, kSumAcross)) {
    const int64_t i = tile * kSumAcross + across;
    A sum = 0;
    if (i < s.size) {
#pragma unroll 4
      for (int64_t b = part; b < blocks; b += kSumParts) sum += partials[b * s.size + i];
    }
    parts[part][across] = sum;
    __syncthreads();
    if (part == 0 && i < s.size) {
      sum = 0;
      for (int j = 0; j < kSumParts; ++j) sum += parts[j][across];
      int which = 0;
      while (i >= s.begin[which + 1]) ++which;
      static_cast<A*>(s.out[which])[i - s.begin[which]] = sum;
    }
    __syncthreads();
  }
}

template <class A>
void launch_inner_sums(const InnerSums& s, const A* partials, int64_t blocks, void* stream) {
  launch(inner_sums_kernel<A>, {divide_up<int64_t>(s.size, kSumAcross)}, kSumThreads, 0, stream, s, partials, blocks);
}

}  // namespace fastmeta::cuda
