// The torch side's few helpers: allocation, dtype dispatch, how work is split over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fastmeta::cpu {

using torch::stable::Tensor;

// The shim's own function: `new_empty` goes through the dispatcher, boxed, which takes longer than small kernels.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dims) {
  int64_t strides[8];
  STD_TORCH_CHECK(dims <= 8, "tensors of up to 8 dimensions, not ", dims);
  for (int64_t d = dims - 1, step = 1; d >= 0; step *= std::max<int64_t>(sizes[d--], 1)) strides[d] = step;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  size_t bytes = size_t(like.element_size());
  for (int64_t d = 0; d < dims; ++d) bytes *= size_t(sizes[d]);
  if (bytes >= kPooledFrom) {
    const auto give_back = [](void* block, void*) { give_block_back(block); };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(take_block(bytes), dims, sizes, strides, 0, dtype,
                                                  aoti_torch_device_type_cpu(), -1, &handle,
                                                  aoti_torch_layout_strided(), nullptr, 0, give_back, nullptr));
    return Tensor(handle);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes.begin(), int64_t(sizes.size()));
}
// `skipped` of its first dimensions left out
inline Tensor new_like(const Tensor& like, bool needed, int64_t skipped = 0) {
  const auto sizes = like.sizes();
  return needed ? new_tensor(like, sizes.data() + skipped, int64_t(sizes.size()) - skipped) : new_tensor(like, {0});
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const Kernels<T>& kernels(const Isa& chosen = isa()) {
  if constexpr (sizeof(T) == 4)
    return chosen.f32;
  else
    return chosen.f64;
}
template <class T>
const Kernels<T>& kernels_for(const int64_t* widths, int64_t layers) {
  return kernels<T>(isa_for(widths, layers, sizeof(T)));
}

// f(float{}) or f(double{}), by the dtype of `t`.
template <class F>
void by_dtype(const char* op, const Tensor& t, const F& f) {
  isa();  // here, since an error inside a parallel loop loses its text
  const auto dtype = t.scalar_type();
  if (dtype == torch::headeronly::ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Double, op, ": the CPU kernels take float32 and float64");
  f(double{});
}

inline void check_dims(const char* op, const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == dims, op, ": expects contiguous tensors of ", dims,
                  " dimensions here, got ", t.dim());
}

// A number for each task, or one for all of them.
template <class T>
Operand<T> of_tasks(const char* op, const Tensor& t, int64_t tasks, const Tensor& like) {
  check_dims(op, t, 1);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && (t.size(0) == tasks || t.size(0) == 1), op,
                  ": needs one number per task, or one for all, in the dtype of the others");
  return {data<T>(t), t.size(0) == tasks};
}

// items [0, n) over the threads; a thread gets no fewer than about `kWorth` operations, `cost` being those of an item
constexpr int64_t kWorth = 50000;
template <class F>
void parallel(int64_t n, int64_t cost, const F& f) {
  if (n <= 0) return;
  const int64_t grain = cost > 0 ? (kWorth + cost - 1) / cost : n;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Into how many ranges to split the rows of each of T tasks, so that all threads have the same number of ranges when
// there are too few tasks to even them out. Depends on the number of threads: so may the last bits of a sum.
inline int64_t row_parts(int64_t tasks, int64_t rows, int64_t least_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks == 0 || tasks >= 4 * threads || tasks % threads == 0) return 1;
  const int64_t wanted = threads / std::gcd(tasks, threads);
  return std::max<int64_t>(1, std::min(wanted, rows / least_rows));
}
struct Range {
  int64_t begin, end;
};
inline Range part(int64_t n, int64_t parts, int64_t i) { return {n * i / parts, n * (i + 1) / parts}; }

}  // namespace fastmeta::cpu
