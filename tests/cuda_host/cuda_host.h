// CUDA's vocabulary on the CPU, as far as the kernels of csrc/cuda use it, so that g++ compiles them and a test can run
// them. One block runs at a time; its threads are coroutines that change places at __syncthreads, in an order that a
// switch reverses: a missing __syncthreads then shows as different results. No warps: kernels use no warp functions.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using std::cos, std::erf, std::exp, std::log, std::sin, std::sqrt, std::tanh;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // of one block at a time
#define FM_DYNAMIC_SHARED(name) unsigned char* name = fastmeta::cuda::host::shared_memory.data()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastmeta::cuda::host {

inline dim3 grid_size, block_index, thread_index;
inline std::vector<unsigned char> shared_memory;
inline ucontext_t scheduler;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline const std::function<void()>* body = nullptr;
inline Thread* current = nullptr;

inline void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}
inline void wait_for_block() {
  swapcontext(&current->context, &scheduler);
}

inline void run_block(std::vector<Thread>& threads, bool reversed) {
  constexpr size_t kStack = 64 << 10;
  for (Thread& t : threads) {
    if (!t.stack) t.stack.reset(new char[kStack]);
    t.done = false;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  for (;;) {
    size_t done = 0;
    for (size_t i = 0; i < threads.size(); ++i) {
      const size_t number = reversed ? threads.size() - 1 - i : i;
      current = &threads[number];
      thread_index.x = unsigned(number);
      if (!current->done) swapcontext(&scheduler, &current->context);
      done += current->done;
    }
    if (done == threads.size()) return;
    // CUDA leaves it undefined when some threads wait and others have ended
    if (done != 0) {
      fprintf(stderr, "cuda_host: %zu of %zu threads ended while the others wait at __syncthreads\n", done,
              threads.size());
      abort();
    }
  }
}

inline void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const char* order = getenv("FASTMETA_HOST_ORDER");
  const bool reversed = order && strcmp(order, "reversed") == 0;
  std::vector<Thread> threads(block.x);
  shared_memory.assign(shared, 0xff);  // NaN
  body = &kernel;
  // few blocks, so that the loops of FM_EACH are run too
  grid_size = dim3(grid.x < 3 ? grid.x : 3, grid.y < 2 ? grid.y : 2, grid.z < 2 ? grid.z : 2);
  for (unsigned z = 0; z < grid_size.z; ++z)
    for (unsigned y = 0; y < grid_size.y; ++y)
      for (unsigned x = 0; x < grid_size.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads, reversed);
      }
}

}  // namespace fastmeta::cuda::host

#define gridDim fastmeta::cuda::host::grid_size
#define blockIdx fastmeta::cuda::host::block_index
#define threadIdx fastmeta::cuda::host::thread_index
#define __syncthreads fastmeta::cuda::host::wait_for_block
