// Mean of each channel of a block of pixels and the sum of squares about it. Twice over a few pixels that are in the
// first-level cache, once over memory; and of the pixels less the block's first, so that a common offset takes no digits.
#pragma once

#include "window.h"

namespace fastmeta::FASTMETA_ISA {

// Pixels [begin, begin + n) of V vectors of channels, beside what `b` holds of those before.
template <class T, int V, bool kTail>
FM_INLINE void add_pixels(const cpu::MomentsBlock<T>& b, int64_t begin, int64_t n, int64_t c, int64_t lanes) {
  constexpr int W = kWidth<T>;
  const T* x = b.x + begin * b.channels + c;
  Vec<T> base[V], sum[V] = {}, middle[V], about[V] = {}, left[V] = {};
  FM_UNROLL for (int v = 0; v < V; ++v) {
    const Vec<T> first = load_lanes<kTail>(b.x + c + v * W, lanes);
    base[v] = first - first == 0 ? first : Vec<T>{};  // finite
  }
  for (int64_t i = 0; i < n; ++i)
    FM_UNROLL for (int v = 0; v < V; ++v) sum[v] += load_lanes<kTail>(x + i * b.channels + v * W, lanes) - base[v];
  FM_UNROLL for (int v = 0; v < V; ++v) middle[v] = sum[v] / T(n);
  for (int64_t i = 0; i < n; ++i)
    FM_UNROLL for (int v = 0; v < V; ++v) {
      const Vec<T> d = load_lanes<kTail>(x + i * b.channels + v * W, lanes) - base[v] - middle[v];
      about[v] += d * d;
      left[v] += d;
    }
  const T before = T(begin), all = T(begin + n);
  FM_UNROLL for (int v = 0; v < V; ++v) {
    const Vec<T> rest = left[v] / T(n);  // what rounding has left between `middle` and the mean
    about[v] -= left[v] * rest;
    middle[v] += rest;
    T *mean = b.mean + c + v * W, *squares = b.squares + c + v * W;
    if (begin > 0) {  // Chan's rule
      const Vec<T> old = load_lanes<kTail>(mean, lanes), between = middle[v] - old;
      middle[v] = old + between * (T(n) / all);
      about[v] += load_lanes<kTail>(squares, lanes) + between * between * (before * T(n) / all);
      sum[v] += old * before;
    }
    // infinities: that of the plain sum
    store_lanes<kTail>(mean, middle[v] == middle[v] ? middle[v] : sum[v] / all, lanes);
    store_lanes<kTail>(squares, about[v], lanes);
  }
}

template <class T>
void norm_moments(const cpu::MomentsBlock<T>& b) {
  constexpr int W = kWidth<T>, V = 4;
  for (int64_t i = 0; i < b.pixels; i += cpu::kMomentPixels) {
    const int64_t n = smaller(cpu::kMomentPixels, b.pixels - i);
    int64_t c = 0;
    for (; c + V * W <= b.channels; c += V * W) add_pixels<T, V, false>(b, i, n, c, W);
    for (; c < b.channels; c += W) add_pixels<T, 1, true>(b, i, n, c, smaller(W, b.channels - c));
  }
}

}  // namespace fastmeta::FASTMETA_ISA
