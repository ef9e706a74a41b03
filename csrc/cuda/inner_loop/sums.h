// Gradients of inputs that all tasks share: each block sums up its own tasks, then blocks are summed up in their order.
#pragma once

#include "../device.h"

#include <fastmeta/launch_inner_loop.h>

namespace fastmeta::cuda {

// Where shared gradients lie in a block's sums: first all weights as a state has them, for a block to add its adjoint
// as it is, then rates, one behind the other.
struct InnerSums {
  static constexpr int kMost = 4 * kInnerLayers + 1;
  void* out[kMost];          // [rows, columns]
  int64_t begin[kMost + 1];  // numbers of the outputs' first elements
  int64_t at[kMost];         // of [rows, ld], in a block's sums
  int columns[kMost], ld[kMost];
  int count = 0;
  int64_t size = 0;   // of all outputs
  int64_t block = 0;  // of a block's sums
};

// Lists the gradients to be summed; with `partials`, the first block's sums, also turns them over to those.
inline InnerSums shared_gradients(InnerLoop& p, void* partials, int64_t element) {
  InnerSums s{};
  const auto add = [&](InnerOutput& o, int64_t rows, int columns, int64_t at, int ld) {
    if (!o.data || o.task != 0) return;
    const int i = s.count++;
    s.out[i] = o.data;
    s.begin[i] = s.size;
    s.at[i] = at;
    s.columns[i] = columns;
    s.ld[i] = ld;
    s.size += rows * columns;
    s.begin[i + 1] = s.size;
    if (partials) o.data = static_cast<char*>(partials) + at * element;
  };
  const auto append = [&](InnerOutput& o, int64_t size) {
    const int before = s.count;
    add(o, 1, int(size), s.block, int(size));
    if (s.count > before) s.block += size;
  };
  for (int l = p.first; l < p.layers; ++l) {
    InnerLayer& a = p.layer[l];
    add(a.d_weight, a.out, a.in, a.at, a.ldw);
    add(a.d_bias, a.out, 1, a.at + a.in, a.ldw);
  }
  p.weight_sums = s.count > 0 ? partials : nullptr;
  if (s.count > 0) s.block = p.first_state;
  for (int l = p.first; l < p.layers; ++l) {
    InnerLayer& a = p.layer[l];
    append(a.d_weight_rate, int64_t(a.out) * a.in);
    append(a.d_bias_rate, a.out);
  }
  append(p.d_rates, int64_t(p.steps) * p.layers);
  s.block = (s.block + 3) & ~int64_t(3);  // quads of the next block's
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
    int which = 0;
    int64_t element = 0;
    A sum = 0;
    if (i < s.size) {
      while (i >= s.begin[which + 1]) ++which;
      element = i - s.begin[which];
      const int64_t row = element / s.columns[which], column = element - row * s.columns[which];
      const A* from = partials + s.at[which] + row * s.ld[which] + column;
#pragma unroll 8
      for (int64_t b = part; b < blocks; b += kSumParts) sum += from[b * s.block];
    }
    parts[part][across] = sum;
    __syncthreads();
    if (part == 0 && i < s.size) {
      sum = 0;
      for (int j = 0; j < kSumParts; ++j) sum += parts[j][across];
      static_cast<A*>(s.out[which])[element] = sum;
    }
    __syncthreads();
  }
}

template <class A>
void launch_inner_sums(const InnerSums& s, const A* partials, int64_t blocks, void* stream) {
  launch(inner_sums_kernel<A>, {divide_up<int64_t>(s.size, kSumAcross)}, kSumThreads, 0, stream, s, partials, blocks);
}

}  // namespace fastmeta::cuda
