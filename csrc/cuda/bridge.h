// What the torch side of the CUDA kernels shares: allocation, checks, the current stream, errors of launches.
// FASTMETA_HOST: the bridges take CPU tensors instead, for the emulation in tests/cuda_host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include <fastmeta/launch.h>

#ifdef FASTMETA_HOST
#define FM_LIBRARY STABLE_TORCH_LIBRARY_IMPL(fastmeta_cuda_host, CPU, m)
#else
#define FM_LIBRARY STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CUDA, m)
#endif

namespace fastmeta::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, float64, float16 and bfloat16");
      return Dtype::f32;
  }
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
}
inline Tensor new_like(const Tensor& like, bool needed) {
  return needed ? torch::stable::new_empty(like, like.sizes()) : new_tensor(like, {0});
}
// Scratch in the type that sums are formed in.
inline Tensor new_sums(const Tensor& like, int64_t size) {
  const ScalarType type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, {&size, 1}, type);
}

inline void check_tensor(const char* op, const Tensor& like, const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == dims, op, ": expects contiguous tensors of ", dims,
                  " dimensions here, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.get_device_index() == like.get_device_index(), op,
                  ": tensors differ in dtype or device");
}
inline const int64_t* labels_of(const char* op, const Tensor& like, const Tensor& t, int64_t tasks) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == 2 && t.size(0) == tasks && t.scalar_type() == ScalarType::Long &&
                      t.get_device_index() == like.get_device_index(),
                  op, ": labels must be contiguous int64 of shape [tasks, rows] on the device of the embeddings");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// The device of `like` is the current one while this lives; `stream` is its current stream.
class OnDevice {
 public:
#ifdef FASTMETA_HOST
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                    "fastmeta: the device has no current CUDA stream");
  }
#endif
  void* stream = nullptr;

  static void check(const char* op) {
    const char* error = last_error();
    STD_TORCH_CHECK(error == nullptr, op, ": a CUDA kernel could not be launched: ", error ? error : "",
                    ". \"no kernel image\" means that fastmeta was built for other GPUs than this one: set "
                    "TORCH_CUDA_ARCH_LIST and build again.");
  }

 private:
#ifndef FASTMETA_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace fastmeta::cuda
