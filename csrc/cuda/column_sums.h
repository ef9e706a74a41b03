// Sums over groups in order: the second half of every reduction that is split over blocks.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

constexpr int kSumThreads = 128;

// out[b, i] = sum_g sums[b, g, i]
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_groups_kernel(const Acc<T>* sums, int64_t batches, int64_t groups, int64_t size, T* out) {
  FM_EACH(tile, x, divide_up<int64_t>(size, kSumThreads)) FM_EACH(b, y, batches) {
    const int64_t i = tile * kSumThreads + threadIdx.x;
    if (i >= size) continue;
    Acc<T> sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += sums[(b * groups + g) * size + i];
    store(out + b * size + i, sum);
  }
}

template <class T>
void launch_add_groups(const void* sums, int64_t batches, int64_t groups, int64_t size, void* out, void* stream) {
  launch(add_groups_kernel<T>, {divide_up<int64_t>(size, kSumThreads), batches}, kSumThreads, 0, stream,
         static_cast<const Acc<T>*>(sums), batches, groups, size, static_cast<T*>(out));
}

}  // namespace fastmeta::cuda
