// CUDA's vocabulary on the CPU, as far as the kernels of csrc/cuda use it, so that g++ compiles them and a test can run
// them. One block runs at a time; its threads are coroutines that change places at __syncthreads, in an order that a
// switch reverses, as it does that of the blocks: a missing __syncthreads, or a write into what another block writes,
// then shows as different results. A write behind a block's dynamic shared memory is an error. No warps: kernels use no
// warp functions.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
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

// A thread's registers while it waits. A ucontext starts a thread on its own stack; from then on changing places takes
// no system call.
using Place = void* [5];
struct Thread {
  ucontext_t context;
  Place place;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};

inline const std::function<void()>* body = nullptr;
inline Thread* current = nullptr;
inline Place scheduler;

[[noreturn, gnu::noinline]] inline void resume(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] inline void wait_for_block() {
  if (__builtin_setjmp(current->place) == 0) resume(scheduler);
}
inline void enter() {
  (*body)();
  current->done = true;
  resume(scheduler);
}
[[gnu::noinline]] inline void run_until_it_waits(Thread& thread) {
  current = &thread;
  if (__builtin_setjmp(scheduler) != 0) return;
  if (thread.started) resume(thread.place);
  thread.started = true;
  setcontext(&thread.context);
}

inline void run_block(std::vector<Thread>& threads, bool reversed, size_t shared) {
  constexpr size_t kStack = 64 << 10, kBehind = 256;
  shared_memory.assign(shared + kBehind, 0xff);  // NaN
  for (Thread& t : threads) {
    if (!t.stack) t.stack.reset(new char[kStack]);
    t.started = t.done = false;
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
      thread_index.x = unsigned(number);
      if (!threads[number].done) run_until_it_waits(threads[number]);
      done += threads[number].done;
    }
    if (done == threads.size()) break;
    // CUDA leaves it undefined when some threads wait and others have ended
    if (done != 0)
      throw std::runtime_error("cuda_host: " + std::to_string(done) + " of " + std::to_string(threads.size()) +
                               " threads ended while the others wait at __syncthreads");
  }
  for (size_t i = shared; i < shared_memory.size(); ++i)
    if (shared_memory[i] != 0xff) throw std::runtime_error("cuda_host: a block wrote behind its shared memory");
}

// Few blocks, so that the loops of FM_EACH are run too.
inline unsigned most_blocks() {
  const char* most = getenv("FASTMETA_HOST_BLOCKS");
  return most ? unsigned(atoi(most)) : 3;
}

inline void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const char* order = getenv("FASTMETA_HOST_ORDER");
  const bool reversed = order && strcmp(order, "reversed") == 0;
  std::vector<Thread> threads(block.x);
  body = &kernel;
  const auto fewer = [](unsigned size, unsigned most) { return size < most ? size : most; };
  grid_size = dim3(fewer(grid.x, most_blocks()), fewer(grid.y, 2), fewer(grid.z, 2));
  const unsigned blocks = grid_size.x * grid_size.y * grid_size.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = reversed ? blocks - 1 - i : i;
    block_index = dim3(block % grid_size.x, block / grid_size.x % grid_size.y, block / grid_size.x / grid_size.y);
    run_block(threads, reversed, shared);
  }
}

}  // namespace fastmeta::cuda::host

#define gridDim fastmeta::cuda::host::grid_size
#define blockIdx fastmeta::cuda::host::block_index
#define threadIdx fastmeta::cuda::host::thread_index
#define __syncthreads fastmeta::cuda::host::wait_for_block
