// Mean of each channel of a block of pixels and the sum of squares about it. Twice over a few pixels that are in the
// first-level cache, once over memory: a large common offset takes no digits from the squares.
#pragma once

#include "window.h"

namespace fastmeta::FASTMETA_ISA {

template <class T, int V, bool kTail>
FM_INLINE void moments_of_channels(const cpu::MomentsBlock<T>& b, int64_t c, int64_t lanes) {
  constexpr int W = kWidth<T>;
  Vec<T> mean[V] = {}, squares[V] = {}, total[V] = {};
  for (int64_t begin = 0; begin < b.pixels; begin += cpu::kMomentPixels) {
    const int64_t n = smaller(cpu::kMomentPixels, b.pixels - begin);
    const T* x = b.x + begin * b.channels + c;
    Vec<T> sum[V] = {}, middle[V], about[V] = {}, left[V] = {};
    for (int64_t i = 0; i < n; ++i)
      FM_UNROLL for (int v = 0; v < V; ++v) sum[v] += load_lanes<kTail>(x + i * b.channels + v * W, lanes);
    FM_UNROLL for (int v = 0; v < V; ++v) middle[v] = sum[v] / T(n);
    for (int64_t i = 0; i < n; ++i)
      FM_UNROLL for (int v = 0; v < V; ++v) {
        const Vec<T> d = load_lanes<kTail>(x + i * b.channels + v * W, lanes) - middle[v];
        about[v] += d * d;
        left[v] += d;
      }
    // what rounding has left between `middle` and the mean; then Chan's rule for the pixels before and these
    FM_UNROLL for (int v = 0; v < V; ++v) {
      const Vec<T> rest = left[v] / T(n), between = middle[v] + rest - mean[v];
      mean[v] += between * (T(n) / T(begin + n));
      squares[v] += about[v] - left[v] * rest + between * between * (T(begin) * T(n) / T(begin + n));
      total[v] += sum[v];
    }
  }
  FM_UNROLL for (int v = 0; v < V; ++v) {
    const Vec<T> plain = total[v] / T(b.pixels);  // infinite where an infinity made `mean` NaN
    store_lanes<kTail>(b.mean + c + v * W, mean[v] == mean[v] ? mean[v] : plain, lanes);
    store_lanes<kTail>(b.squares + c + v * W, squares[v], lanes);
  }
}

template <class T>
void norm_moments(const cpu::MomentsBlock<T>& b) {
  constexpr int W = kWidth<T>, V = kWideVectors;
  int64_t c = 0;
  for (; c + V * W <= b.channels; c += V * W) moments_of_channels<T, V, false>(b, c, W);
  for (; c < b.channels; c += W) moments_of_channels<T, 1, true>(b, c, smaller(W, b.channels - c));
}

}  // namespace fastmeta::FASTMETA_ISA
