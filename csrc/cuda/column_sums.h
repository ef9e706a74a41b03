// Sums over groups in order: the second half of every reduction that is split over blocks.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

constexpr int kSumColumns = 32, kSumRows = 8;

// What each of 8 rows of threads has found of 32 columns, added up in order; the first row gets the sums.
template <class A>
__device__ __forceinline__ A add_rows(A (&parts)[kSumRows][kSumColumns], A sum) {
  const int lane = int(threadIdx.x) % kSumColumns, across = int(threadIdx.x) / kSumColumns;
  __syncthreads();
  parts[across][lane] = sum;
  __syncthreads();
  if (across == 0)
    for (int i = 1; i < kSumRows; ++i) sum += parts[i][lane];
  return sum;
}

// out[b, i] = sum_g sums[b, g, i], of groups that are `pitch` apart
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows, 4)
    add_groups_kernel(const Acc<T>* sums, int64_t batches, int64_t groups, int64_t size, int64_t pitch, T* out) {
  __shared__ Acc<T> parts[kSumRows][kSumColumns];
  const int lane = int(threadIdx.x) % kSumColumns, across = int(threadIdx.x) / kSumColumns;
  FM_EACH(tile, x, divide_up<int64_t>(size, kSumColumns)) FM_EACH(b, y, batches) {
    const int64_t i = tile * kSumColumns + lane;
    Acc<T> sum = 0;
    if (i < size)
      for (int64_t g = across; g < groups; g += kSumRows) sum += sums[(b * groups + g) * pitch + i];
    sum = add_rows(parts, sum);
    if (across == 0 && i < size) store(out + b * size + i, sum);
  }
}

// pitch 0: they lie one behind the other
template <class T>
void launch_add_groups(const void* sums, int64_t batches, int64_t groups, int64_t size, void* out, void* stream,
                       int64_t pitch = 0) {
  launch(add_groups_kernel<T>, {divide_up<int64_t>(size, kSumColumns), batches}, kSumColumns * kSumRows, 0, stream,
         static_cast<const Acc<T>*>(sums), batches, groups, size, pitch ? pitch : size, static_cast<T*>(out));
}

}  // namespace fastmeta::cuda
