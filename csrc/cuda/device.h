// What every kernel file starts from: accumulation types, conversions, launches. FASTMETA_HOST replaces the CUDA
// headers by an emulation on the CPU (tests/cuda_host), which checks indices where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTMETA_HOST
#include <cuda_host.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <fastmeta/launch.h>

namespace fastmeta::cuda {

// Halves are summed in float.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

template <class T>
__device__ __forceinline__ Acc<T> load(const T* p) {
  return static_cast<Acc<T>>(*p);
}
template <class T>
__device__ __forceinline__ void store(T* p, Acc<T> v) {
  *p = static_cast<T>(v);
}

template <class I>
__host__ __device__ __forceinline__ I divide_up(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
__host__ __device__ __forceinline__ I smaller(I a, I b) {
  return a < b ? a : b;
}

// Blocks walk up to three dimensions by FM_EACH, each as wide as it likes: any size is one launch, none is no launch,
// and no index is taken apart by 64-bit divisions, which cost registers.
#define FM_EACH(i, axis, count) for (int64_t i = blockIdx.axis, end_##i = (count); i < end_##i; i += gridDim.axis)

struct Grid {
  int64_t x, y = 1, z = 1;
};

template <class... P, class... V>
void launch(void (*kernel)(P...), Grid size, int threads, size_t shared, void* stream, V... arguments) {
  if (size.x <= 0 || size.y <= 0 || size.z <= 0) return;
  const dim3 grid(unsigned(smaller<int64_t>(size.x, 1 << 30)), unsigned(smaller<int64_t>(size.y, 65535)),
                  unsigned(smaller<int64_t>(size.z, 65535)));
  const dim3 block(unsigned(threads), 1, 1);
#ifdef FASTMETA_HOST
  (void)stream;
  host::run(grid, block, shared, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the dtype
template <class F>
void by_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f64: return f(Type<double>{});
#ifndef FASTMETA_HOST
    case Dtype::f16: return f(Type<__half>{});
    case Dtype::bf16: return f(Type<__nv_bfloat16>{});
#endif
    default: return;
  }
}

}  // namespace fastmeta::cuda
