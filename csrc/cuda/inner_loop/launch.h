// The kernels of the fused inner loops and how they are launched: a block runs a task from start to end.
#pragma once

#include "sums.h"
#include "task.h"

namespace fastmeta::cuda {

// What registers are shared out for: with two of the largest blocks a thread has 128, enough for none to be spilled,
// and there is room for eight blocks of 64. Weights in far memory take more registers than that.
template <class A, bool kChip>
constexpr int kInnerBlocks = kChip && sizeof(A) == sizeof(float) ? 2 : 1;

// kChip: a block's memory is its shared memory; else its states are not, and its rows may be.
// kMeta: with query rows, else for the adapted weights.
template <class A, bool kChip, bool kMeta, bool kBackward>
__global__ void __launch_bounds__(kInnerThreads, (kInnerBlocks<A, kChip>))
    inner_loop_kernel(const __grid_constant__ InnerLoop p) {
  FM_DYNAMIC_SHARED(shared);
  A* far = static_cast<A*>(p.scratch) + p.block_scratch * blockIdx.x + p.kept;
  A* states = kChip ? reinterpret_cast<A*>(shared) : far;
  A* rows = !kChip && p.rows_on_chip ? reinterpret_cast<A*>(shared) : states + p.states_size;
  using Near = Field<A, kChip>;
  InnerTask<A, kChip> t(p, Near(rows), Near(states));
  for (t.task = int(blockIdx.x); t.task < p.tasks; t.task += int(gridDim.x)) {
    t.start();
    if (kBackward) t.start_gradients();
    __syncthreads();
    if (kMeta || !kBackward || p.sweeps) t.adapt(kBackward && p.sweeps);
    if (kBackward) {
      if (kMeta)
        t.query_backward();
      else
        t.take_gradients();
      __syncthreads();
      if (p.sweeps) t.sweep();
      t.finish_gradients();
    } else if (kMeta) {
      t.query_forward();
    } else {
      t.give_adapted();
    }
    __syncthreads();
  }
}

template <class F>
void by_exact_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f(Type<float>{});
  if (dtype == Dtype::f64) return f(Type<double>{});
}

// What the device gives: bytes of shared memory for one block, and how many blocks it runs at once.
struct InnerDevice {
  int64_t shared = 0;
  int processors = 1;

  InnerDevice() {
#ifdef FASTMETA_HOST
    const char* limit = getenv("FASTMETA_HOST_SHARED");
    shared = limit ? atoll(limit) : 160 << 10;
#else
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    shared = bytes;
#endif
  }

  template <class Kernel>
  int64_t blocks(Kernel kernel, int threads, size_t bytes, bool on_chip) const {
#ifdef FASTMETA_HOST
    (void)kernel, (void)threads, (void)bytes, (void)on_chip;
    return host::most_blocks();
#else
    if (bytes > 0) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    // weights in far memory need the cache that shared memory is taken from
    if (on_chip)
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    int each = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, bytes);
    return int64_t(each > 0 ? each : 1) * processors;
#endif
  }
};

constexpr int64_t kInnerScratch = int64_t(512) << 20;  // bytes, as long as one block needs no more

template <class A, bool kMeta, bool kBackward, class F>
void with_inner_kernel(bool on_chip, const F& f) {
  if (on_chip)
    f(inner_loop_kernel<A, true, kMeta, kBackward>);
  else
    f(inner_loop_kernel<A, false, kMeta, kBackward>);
}

template <bool kMeta, bool kBackward>
InnerPlan plan_inner_loop(Dtype dtype, InnerLoop& p) {
  InnerPlan plan{};
  by_exact_dtype(dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    const InnerDevice device;
    p.processors = device.processors;
    plan.block_elements = lay_out(p, kBackward, kMeta, sizeof(A), device.shared, plan.on_chip);
    plan.shared = size_t(plan.on_chip ? plan.block_elements : p.rows_on_chip ? p.rows_size : 0) * sizeof(A);
    const int64_t off_chip = plan.on_chip ? 0 : p.rows_on_chip ? p.states_size : plan.block_elements;
    p.block_scratch = p.kept + ((off_chip + 3) & ~int64_t(3));
    p.partials = shared_gradients(p).block;
    with_inner_kernel<A, kMeta, kBackward>(
        plan.on_chip, [&](auto kernel) { plan.blocks = device.blocks(kernel, p.threads, plan.shared, plan.on_chip); });
    const int64_t each = p.block_scratch + p.partials;
    const int64_t room = each > 0 ? kInnerScratch / int64_t(sizeof(A)) / each : plan.blocks;
    plan.blocks = smaller(plan.blocks, smaller<int64_t>(p.tasks, room > 1 ? room : 1));
    plan.scratch = plan.blocks * each;
  });
  return plan;
}

template <bool kMeta, bool kBackward>
void launch_inner_loop(Dtype dtype, InnerLoop p, const InnerPlan& plan, void* scratch, void* stream) {
  by_exact_dtype(dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    A* partials = static_cast<A*>(scratch) + plan.blocks * p.block_scratch;
    p.scratch = scratch;
    const InnerSums sums = shared_gradients(p, partials);
    with_inner_kernel<A, kMeta, kBackward>(plan.on_chip, [&](auto kernel) {
      launch(kernel, {plan.blocks}, p.threads, plan.shared, stream, p);
    });
    if (kBackward) launch_inner_sums<A>(sums, partials, plan.blocks, stream);
  });
}

}  // namespace fastmeta::cuda
