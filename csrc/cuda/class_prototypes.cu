// Class means and their gradient.
#include "device.h"

namespace fastmeta::cuda {
namespace {

constexpr int kColumns = 32, kRows = 8, kThreads = kColumns * kRows, kLabels = 256;

// A warp owns one class and 32 features, and walks the task's labels: rows are summed in order, and which rows count is
// the same question for the whole warp, so each row is read once, by the warp of its class.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) class_prototypes_kernel(ClassPrototypes p) {
  __shared__ int labels[kLabels];
  const int lane = int(threadIdx.x) % kColumns, row = int(threadIdx.x) / kColumns;
  FM_EACH(t, x, p.tasks) FM_EACH(class_tile, y, divide_up<int64_t>(p.classes, kRows))
  FM_EACH(column_tile, z, divide_up<int64_t>(p.width, kColumns)) {
    const int64_t column = column_tile * kColumns + lane, label = class_tile * kRows + row;
    const T* x = static_cast<const T*>(p.x) + t * p.support * p.width + column;
    Acc<T> sum = 0, count = 0;
    for (int64_t first = 0; first < p.support; first += kLabels) {
      const int n = int(smaller<int64_t>(kLabels, p.support - first));
      __syncthreads();
      if (int(threadIdx.x) < n) {
        const int64_t l = p.labels[t * p.support + first + threadIdx.x];
        labels[threadIdx.x] = l >= 0 && l < p.classes ? int(l) : -1;
      }
      __syncthreads();
      for (int s = 0; s < n; ++s) {
        if (labels[s] != label) continue;
        count += 1;
        if (column < p.width) sum += load(x + (first + s) * p.width);
      }
    }
    if (label < p.classes && column < p.width)
      store(static_cast<T*>(p.out) + (t * p.classes + label) * p.width + column, count > 0 ? sum / count : sum);
  }
}

// A warp owns one row of the support set: counts the rows of its class, then copies the class's gradient over that.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) class_prototypes_bwd_kernel(ClassPrototypes p) {
  __shared__ int counts[kRows][kColumns];
  const int lane = int(threadIdx.x) % kColumns, row = int(threadIdx.x) / kColumns;
  FM_EACH(t, x, p.tasks) FM_EACH(tile, y, divide_up<int64_t>(p.support, kRows)) {
    const int64_t s = tile * kRows + row;
    const int64_t* labels = p.labels + t * p.support;
    const int64_t label = s < p.support ? labels[s] : -1;
    const bool known = label >= 0 && label < p.classes;
    int count = 0;
    if (known)
      for (int64_t i = lane; i < p.support; i += kColumns) count += labels[i] == label;
    __syncthreads();
    counts[row][lane] = count;
    __syncthreads();
    if (s >= p.support) continue;
    int total = 0;
    for (int i = 0; i < kColumns; ++i) total += counts[row][i];
    const T* grad = static_cast<const T*>(p.x) + (t * p.classes + (known ? label : 0)) * p.width;
    T* out = static_cast<T*>(p.out) + (t * p.support + s) * p.width;
    for (int64_t k = lane; k < p.width; k += kColumns)
      store(out + k, known ? load(grad + k) / Acc<T>(total) : Acc<T>(0));
  }
}

}  // namespace

void launch_class_prototypes(Dtype dtype, const ClassPrototypes& p, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Grid grid{p.tasks, divide_up<int64_t>(p.classes, kRows), divide_up<int64_t>(p.width, kColumns)};
    launch(class_prototypes_kernel<T>, grid, kThreads, 0, stream, p);
  });
}

void launch_class_prototypes_bwd(Dtype dtype, const ClassPrototypes& p, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.width == 0) return;
    launch(class_prototypes_bwd_kernel<T>, {p.tasks, divide_up<int64_t>(p.support, kRows)}, kThreads, 0, stream, p);
  });
}

}  // namespace fastmeta::cuda
