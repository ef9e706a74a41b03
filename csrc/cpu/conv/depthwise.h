// Convolutions whose groups are single channels: vectors hold neighbouring channels, each with its own weights.
#pragma once

#include "strips.h"

namespace fastmeta::FASTMETA_ISA {

FM_INLINE bool is_depthwise(const cpu::ConvGeometry& g) { return g.source_channels() == 1 && g.out_channels() == 1; }

// out[p, c] = start[c] + sum over taps of source[row[p] + step[tap] + c] weight[tap, c], c being `lanes` channels
template <class T, int kPixels>
FM_INLINE void depthwise_tile(const T* source, const int32_t* row, const int32_t* step, int64_t taps, const T* weight,
                              int64_t ld, const T* start, T* out, const int32_t* out_row, int64_t lanes) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[kPixels];
  FM_UNROLL for (int p = 0; p < kPixels; ++p) sum[p] = load(start);
  if (lanes == W) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Vec<T> w = load(weight + tap * ld);
      FM_UNROLL for (int p = 0; p < kPixels; ++p) sum[p] += load(source + row[p] + step[tap]) * w;
    }
    FM_UNROLL for (int p = 0; p < kPixels; ++p) store(out + out_row[p], sum[p]);
    return;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Vec<T> w = load(weight + tap * ld);
    FM_UNROLL for (int p = 0; p < kPixels; ++p) sum[p] += load_first(source + row[p] + step[tap], lanes) * w;
  }
  FM_UNROLL for (int p = 0; p < kPixels; ++p) store_first(out + out_row[p], sum[p], lanes);
}

template <class T>
struct DepthwiseSpace {
  Strips<T> strips;
  int32_t* step;
  int64_t width;
  T *weights, *start;  // [taps in order, width]

  explicit DepthwiseSpace(const cpu::ConvGeometry& g) : strips(g), width(padded<T>(g.out_c)) {
    Carver carver{nullptr};
    carve(carver, g);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    carve(carver, g);
    int32_t* to = step;
    for (int64_t p = 0; p < g.phase_count; to += g.phases[p++].tap_count) strips.steps_of(g.phases[p], to);
  }
  void carve(Carver& c, const cpu::ConvGeometry& g) {
    strips.carve(c);
    step = c.take<int32_t>(g.kernel);
    weights = c.take<T>(g.kernel * width);
    start = c.take<T>(width);
  }
};

template <class T>
void depthwise(const cpu::ConvItem<T>& item) {
  constexpr int W = kWidth<T>;
  const cpu::ConvGeometry& g = *item.geometry;
  DepthwiseSpace<T> space(g);
  const int64_t channels = g.out_c, width = space.width;
  fill_zero(space.start, width);
  if (item.bias) memcpy(space.start, item.bias, size_t(channels) * sizeof(T));
  for (int64_t tap = 0; tap < g.kernel; ++tap)
    for (int64_t c = 0; c < width; ++c)
      space.weights[tap * width + c] = c < channels ? item.weight[c * g.kernel + g.taps[tap].index] : T(0);
  for (int64_t begin = item.begin; begin < item.end;) {
    begin = space.strips.take(item.source, begin, item.end);
    T* out = item.out + space.strips.out_start();
    for (int64_t phase = 0; phase < g.phase_count; ++phase) {
      const int64_t pixels = space.strips.pixels_of(phase), taps = g.phases[phase].tap_count;
      const int32_t *row = space.strips.row, *to = space.strips.out_row, *step = space.step + g.phases[phase].taps;
      const T* weights = space.weights + g.phases[phase].taps * width;
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t lanes = smaller(W, channels - c);
        const T* source = space.strips.source + c;
        int64_t i = 0;
        for (; i + 6 <= pixels; i += 6)
          depthwise_tile<T, 6>(source, row + i, step, taps, weights + c, width, space.start + c, out + c, to + i, lanes);
        for (; i < pixels; ++i)
          depthwise_tile<T, 1>(source, row + i, step, taps, weights + c, width, space.start + c, out + c, to + i, lanes);
      }
    }
  }
}

// weight[tap, c] += sum over pixels of source[row[p] + step[tap] + c] grad[p, c]
template <class T, int kTaps>
FM_INLINE void depthwise_weight_tile(const T* source, const int32_t* row, int64_t pixels, const int32_t* step,
                                     const T* grad, int64_t ld_grad, T* weight, int64_t ld, int64_t lanes) {
  Vec<T> sum[kTaps];
  FM_UNROLL for (int t = 0; t < kTaps; ++t) sum[t] = Vec<T>{};
  for (int64_t p = 0; p < pixels; ++p, grad += ld_grad) {
    const T* from = source + row[p];
    if (lanes == kWidth<T>) {
      const Vec<T> g = load(grad);
      FM_UNROLL for (int t = 0; t < kTaps; ++t) sum[t] += load(from + step[t]) * g;
    } else {
      const Vec<T> g = load_first(grad, lanes);
      FM_UNROLL for (int t = 0; t < kTaps; ++t) sum[t] += load_first(from + step[t], lanes) * g;
    }
  }
  FM_UNROLL for (int t = 0; t < kTaps; ++t) store(weight + t * ld, load(weight + t * ld) + sum[t]);
}

template <class T>
void depthwise_weight(const cpu::ConvWeightItem<T>& item) {
  constexpr int W = kWidth<T>;
  const cpu::ConvGeometry& g = *item.geometry;
  DepthwiseSpace<T> space(g);
  const int64_t channels = g.out_c, width = space.width;
  fill_zero(space.weights, g.kernel * width);
  for (int64_t begin = item.begin; begin < item.end;) {
    begin = space.strips.take(item.source, begin, item.end);
    const int64_t pixels = space.strips.pixels_of(0);
    const T* grad = item.grad + space.strips.out_start();
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = smaller(W, channels - c);
      const T* source = space.strips.source + c;
      const int32_t *row = space.strips.row, *step = space.step;
      T* to = space.weights + c;
      int64_t tap = 0;
      for (; tap + 9 <= g.kernel; tap += 9)
        depthwise_weight_tile<T, 9>(source, row, pixels, step + tap, grad + c, channels, to + tap * width, width, lanes);
      for (; tap + 3 <= g.kernel; tap += 3)
        depthwise_weight_tile<T, 3>(source, row, pixels, step + tap, grad + c, channels, to + tap * width, width, lanes);
      for (; tap < g.kernel; ++tap)
        depthwise_weight_tile<T, 1>(source, row, pixels, step + tap, grad + c, channels, to + tap * width, width, lanes);
    }
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < g.kernel; ++tap)
      item.d_weight[c * g.kernel + tap] = space.weights[tap * width + c];
}

}  // namespace fastmeta::FASTMETA_ISA
