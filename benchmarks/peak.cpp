// What one core does at best: multiply-adds in registers, and streams of floats. benchmarks/roofline.py compiles this
// for the processor at hand and runs it on as many threads as the benchmarks have. Each function returns the rate of
// the quickest of many short bursts, which other work on the machine does not interrupt, in operations or bytes a second.
#include <algorithm>
#include <chrono>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kSums = 12;  // in flight: more than latency times units of any processor here, fewer than its registers

// The rounds' sums end up in memory, so that the compiler cannot leave the work out.
void store(const Vector* sums, float* to) {
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane] = 0;
    for (int i = 0; i < kSums; ++i) to[lane] += sums[i][lane];
  }
}

template <typename Burst>
double best(long bursts, double amount, Burst burst) {
  double least = std::numeric_limits<double>::infinity();
  for (long i = 0; i < bursts; ++i) {
    const auto start = std::chrono::steady_clock::now();
    burst();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return amount / least;
}

}  // namespace

extern "C" double multiply_adds(float* memory, long rounds, long bursts) {
  return best(bursts, 2.0 * kSums * kLanes * rounds, [=] {
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + memory[i];
    const Vector factor = Vector{} + 0.999f, term = Vector{} + memory[0];
    for (long round = 0; round < rounds; ++round)
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
    store(sums, memory);
  });
}

// Sums of `count` floats.
extern "C" double read(float* memory, long count, long rounds, long bursts) {
  constexpr int kBlock = kSums * kLanes;
  const long whole = count / kBlock * kBlock;
  return best(bursts, 1.0 * sizeof(float) * whole * rounds, [=] {
    Vector sums[kSums] = {};
    for (long round = 0; round < rounds; ++round)
      for (const float *at = memory, *end = memory + whole; at < end; at += kBlock)
        for (int i = 0; i < kSums; ++i) sums[i] += *reinterpret_cast<const Vector*>(at + i * kLanes);
    store(sums, memory);
  });
}

// c = a + scale * b, three arrays of `count / 3` floats, of which 16 are a cache line.
extern "C" double triad(float* memory, long count, long rounds, long bursts) {
  const long third = count / 48 * 16;
  const float *a = memory, *b = memory + third;
  float* __restrict to = memory + 2 * third;
  return best(bursts, 3.0 * sizeof(float) * third * rounds, [=] {
    for (long round = 0; round < rounds; ++round) {
      for (long i = 0; i < third; ++i) to[i] = a[i] + 0.5f * b[i];
      asm volatile("" ::: "memory");  // the next round is not the same work
    }
  });
}
