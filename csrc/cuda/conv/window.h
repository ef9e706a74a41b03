// The pixels that a 2x2 pool takes together, or one where there is no pool, with what norm and activation make of them.
// A block has 32 channels of a piece of one unit's windows; a row of its threads takes a window after the other.
#pragma once

#include "../column_sums.h"
#include "../curve.h"
#include "cursor.h"
#include "pieces.h"

#include <fastmeta/launch_conv.h>

namespace fastmeta::cuda {

constexpr int kWindow = 4, kNormThreads = kSumColumns * kSumRows;

inline Grid norm_grid(const NormActPool& p) {
  return {p.units(), sum_count(p.windows()), divide_up<int64_t>(p.channels, kSumColumns)};
}
// Walks the blocks of `norm_grid`; `channel` is the thread's.
#define FM_EACH_PIECE(unit, piece, channel, p, pieces)                                 \
  FM_EACH(unit, x, (p).tasks * (p).units_each) FM_EACH(piece, y, (pieces).count)       \
  for (int64_t channel = blockIdx.z * kSumColumns + threadIdx.x % kSumColumns,         \
       past = divide_up<int64_t>((p).channels, kSumColumns) * kSumColumns;             \
       channel < past; channel += gridDim.z * kSumColumns)

__host__ __device__ inline bool has_statistics(const NormActPool& p) {  // that depend on x
  return p.norm == Norm::batch || p.norm == Norm::group;
}

// As in torch: 0 is not active, NaN is where there is no slope. Other activations than these four would bring much code
// to every kernel.
template <class A>
__device__ __forceinline__ Curve<A> curve_of(const NormActPool& p, A z) {
  const A slope = A(p.slope);
  switch (p.activation) {
    case Activation::relu:
      if (slope == 0 ? !(z <= 0) : z > 0) return {z, A(1), A(0)};
      return {slope == 0 ? A(0) : slope * z, slope, A(0)};
    case Activation::silu: return curve_at(Activation::silu, z);
    case Activation::gelu: return curve_at(Activation::gelu, z);
    default: return {z, A(1), A(0)};
  }
}
__host__ __device__ inline bool is_curved(const NormActPool& p) {
  return p.activation == Activation::silu || p.activation == Activation::gelu;
}

// Norm and affine map of a unit's channel: z = n * weight + bias.
template <class A>
struct Scale {
  A mean, rstd, weight, bias;
};
template <class T>
__device__ __forceinline__ Acc<T> channel_of(const ConvInput& t, int64_t task, int64_t channel, Acc<T> otherwise) {
  return t.data ? load(static_cast<const T*>(t.data) + task * t.task + channel) : otherwise;
}
template <class T>
__device__ __forceinline__ Scale<Acc<T>> scale_of(const NormActPool& p, int64_t unit, int64_t channel) {
  using A = Acc<T>;
  const int64_t task = unit / p.units_each;
  Scale<A> s{0, 1, channel_of<T>(p.weight, task, channel, 1), channel_of<T>(p.bias, task, channel, 0)};
  if (p.norm == Norm::none) return s;
  const int64_t at = (unit - task * p.units_each) * p.groups + channel / (p.channels / p.groups);
  s.mean = channel_of<A>(p.mean, task, at, 0);
  s.rstd = A(1) / sqrt(channel_of<A>(p.var, task, at, 1) + A(p.eps));
  return s;
}

// Where a window's numbers are, of one channel.
struct Window {
  int64_t first, down, across, pooled;  // its first pixel, steps to the others; the pool's output
  bool inside[kWindow];                 // the image
  bool whole;                           // else the pool drops it
  __device__ __forceinline__ int64_t at(int k) const { return first + (k / 2) * down + (k % 2) * across; }
};

template <class F>
__device__ __forceinline__ void each_window(const NormActPool& p, int64_t unit, int64_t piece, int64_t channel,
                                            Pieces pieces, const F& f) {
  const int size = p.pool == Pool::none ? 1 : 2;
  const int high = divide_up(int(p.height), size), wide = divide_up(int(p.width), size);
  const int64_t images = p.rows / p.units_each, windows = images * high * wide;
  const int64_t first = piece * pieces.length, end = smaller(windows, first + pieces.length);
  const int64_t start = first + int(threadIdx.x) / kSumColumns;
  if (start >= end || channel >= p.channels) return;
  Cursor at(start, high, wide);
  for (int64_t w = start; w < end; w += kSumRows, at.advance(kSumRows)) {
    const int64_t image = unit * images + at.image;
    const int i = at.i * size, j = at.j * size;
    const bool right = size == 2 && j + 1 < p.width, below = size == 2 && i + 1 < p.height;
    f(Window{((image * p.height + i) * p.width + j) * p.channels + channel,
             p.width * p.channels,
             p.channels,
             ((image * (p.height / size) + at.i) * (p.width / size) + at.j) * p.channels + channel,
             {true, right, below, right && below},
             size == 1 || (right && below)});
  }
}

// n, and the activation at z, of a window's pixels.
template <class A>
struct Pixels {
  A n[kWindow];
  Curve<A> y[kWindow];
  Pool pool;
  bool whole;
  bool beats[kWindow];  // a pixel all those before it: the last that does is the maximum, as in torch, where NaN beats

  template <class T>
  __device__ __forceinline__ Pixels(const NormActPool& p, const Scale<A>& s, const Window& w, const T* x)
      : pool(p.pool), whole(w.whole) {
    A best = 0;
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      n[k] = w.inside[k] ? (load(x + w.at(k)) - s.mean) * s.rstd : A(0);
      y[k] = curve_of(p, n[k] * s.weight + s.bias);
      const A value = y[k].value;
      beats[k] = k == 0 || (pool == Pool::max && (value > best || value != value));
      if (beats[k]) best = value;
    }
  }

  // What the pool makes of its pixels' values, and what a gradient of that is for pixel k.
  __device__ __forceinline__ A pooled(const A (&value)[kWindow]) const {
    if (pool == Pool::average) return (value[0] + value[1] + value[2] + value[3]) * A(0.25);
    A found = value[0];
#pragma unroll
    for (int k = 1; k < kWindow; ++k)
      if (beats[k]) found = value[k];
    return found;
  }
  __device__ __forceinline__ A routed(A grad, int k) const {
    if (pool == Pool::average) return whole ? A(0.25) * grad : A(0);
    bool chosen = whole && beats[k];
#pragma unroll
    for (int later = 1; later < kWindow; ++later) chosen = chosen && !(later > k && beats[later]);
    return chosen ? grad : A(0);
  }
};

}  // namespace fastmeta::cuda
