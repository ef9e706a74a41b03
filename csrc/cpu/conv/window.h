// What the passes of norm_act_pool share: activations of one vector with two derivatives, the lines of a block of images,
// and the pixels of one window of the pool.
#pragma once

#include <fastmeta/vmath.h>

#include "../kernels.h"

namespace fastmeta::FASTMETA_ISA {

// Vectors of channels at once: as many as the registers hold with their tables of numbers.
constexpr int kWideVectors = FASTMETA_VECTOR_BYTES == 64 ? 4 : 2;

// ---- activations

// value(z); slope(z), which times(g, slope) takes g back through; with kCurved, second(z).

// identity, relu and leaky relu. Selected, not multiplied: as in torch no NaN gets through an inactive relu, and NaN is
// active.
template <class T>
struct PiecewiseLinear {
  static constexpr bool kMonotone = true, kCurved = false;
  static constexpr int kVectors = kWideVectors;
  Vec<T> below;
  IntVec<T> kept;  // no bits of relu's

  explicit PiecewiseLinear(const cpu::NormBlock<T>& b) {
    below = broadcast(b.activation == cpu::kRelu ? b.slope : T(1));
    kept = broadcast_integer<T>(b.activation == cpu::kRelu && b.slope == 0 ? 0 : -1);
  }
  FM_INLINE Vec<T> value(Vec<T> z) const { return times(z, slope(z)); }
  FM_INLINE IntVec<T> slope(Vec<T> z) const { return z <= 0; }
  FM_INLINE Vec<T> times(Vec<T> g, IntVec<T> inactive) const {
    return inactive ? (Vec<T>)((IntVec<T>)(g * below) & kept) : g;
  }
};

template <class T>
struct Gelu {
  static constexpr bool kMonotone = false, kCurved = true;
  static constexpr int kVectors = 1;

  explicit Gelu(const cpu::NormBlock<T>&) {}
  static FM_INLINE Vec<T> below(Vec<T> z) { return T(0.5) * (1 + error_function<T>(z * T(0.70710678118654752440))); }
  static FM_INLINE Vec<T> density(Vec<T> z) { return T(0.39894228040143267794) * exponential<T>(T(-0.5) * z * z); }
  FM_INLINE Vec<T> value(Vec<T> z) const { return z * below(z); }
  FM_INLINE Vec<T> slope(Vec<T> z) const { return below(z) + z * density(z); }
  FM_INLINE Vec<T> times(Vec<T> g, Vec<T> slope) const { return g * slope; }
  FM_INLINE Vec<T> second(Vec<T> z) const { return density(z) * (2 - z * z); }
};

template <class T>
struct Silu {
  static constexpr bool kMonotone = false, kCurved = true;
  static constexpr int kVectors = 1;

  explicit Silu(const cpu::NormBlock<T>&) {}
  FM_INLINE Vec<T> value(Vec<T> z) const { return z * sigmoid<T>(z); }
  FM_INLINE Vec<T> slope(Vec<T> z) const {
    const Vec<T> s = sigmoid<T>(z);
    return s * (1 + z * (1 - s));
  }
  FM_INLINE Vec<T> times(Vec<T> g, Vec<T> slope) const { return g * slope; }
  FM_INLINE Vec<T> second(Vec<T> z) const {
    const Vec<T> s = sigmoid<T>(z);
    return s * (1 - s) * (2 + z * (1 - 2 * s));
  }
};

// ---- lines

// A row of outputs and the row or two of inputs that they come from; offsets in numbers.
struct Line {
  int64_t in, out;   // of its first pixel
  int64_t rows;      // of input
  int64_t windows;   // outputs, 0 where an odd last row is dropped
};

template <class T>
FM_INLINE Line line_of(const cpu::NormBlock<T>& b, int64_t l) {
  const int64_t step = b.pool == cpu::kNoPool ? 1 : 2, lines = divide_up(b.height, step);
  const int64_t image = l / lines, i = l % lines, rows = smaller(step, b.height - i * step);
  return {(image * b.height + i * step) * b.width * b.channels,
          (image * (b.height / step) + i) * (b.width / step) * b.channels, rows, rows == step ? b.width / step : 0};
}

// pass.line<vectors, kTail>(line, channel, lanes) for all lines of a block and all channels, `lanes` of the last vector.
template <class Pass, class T>
FM_INLINE void over_lines(const cpu::NormBlock<T>& b, Pass& pass) {
  constexpr int W = kWidth<T>, V = Pass::kVectors;
  for (int64_t l = b.first; l < b.last; ++l) {
    const Line line = line_of(b, l);
    int64_t c = 0;
    if constexpr (V > 1)
      for (; c + V * W <= b.channels; c += V * W) pass.template line<V, false>(line, c, W);
    for (; c < b.channels; c += W) pass.template line<1, true>(line, c, smaller(W, b.channels - c));
  }
}

template <bool kTail, class T>
FM_INLINE Vec<T> load_lanes(const T* p, int64_t lanes) {
  if constexpr (kTail)
    return load_first(p, lanes);
  else
    return load(p);
}
template <bool kTail, class T>
FM_INLINE void store_lanes(T* p, Vec<T> v, int64_t lanes) {
  if constexpr (kTail)
    store_first(p, v, lanes);
  else
    store(p, v);
}

// Rows of a block's tables, for V vectors of channels.
template <class T, int V, int N>
FM_INLINE void load_tables(const cpu::NormBlock<T>& b, int64_t c, Vec<T> (&to)[N][V]) {
  FM_UNROLL for (int k = 0; k < N; ++k)
    FM_UNROLL for (int v = 0; v < V; ++v) to[k][v] = load(b.tables + k * b.padded + c + v * kWidth<T>);
}

// ---- windows

// One vector of channels of an output's pixels: less the mean (d), and after the norm (z).
template <class T, class Act, int kPool>
struct Window {
  static constexpr int K = kPool == cpu::kNoPool ? 1 : 4;
  Vec<T> d[K], z[K];
  IntVec<T> later[K];  // of max: pixel k is larger than those before it

  template <bool kTail>
  FM_INLINE void read(const T* x, int64_t channels, int64_t row, int64_t lanes, Vec<T> mean, Vec<T> scale, Vec<T> bias) {
    FM_UNROLL for (int k = 0; k < K; ++k) {
      d[k] = load_lanes<kTail>(x + k % 2 * channels + k / 2 * row, lanes) - mean;
      z[k] = d[k] * scale + bias;
    }
  }
  FM_INLINE Vec<T> value(const Act& act) {
    if constexpr (kPool == cpu::kNoPool) return act.value(z[0]);
    if constexpr (kPool == cpu::kMaxPool) {
      const Vec<T> most = largest(act);
      return Act::kMonotone ? act.value(most) : most;
    }
    Vec<T> sum = act.value(z[0]);
    FM_UNROLL for (int k = 1; k < K; ++k) sum += act.value(z[k]);
    return T(0.25) * sum;
  }
  // The largest of z, or of its activation where that has another order. The first of equal ones, and the last NaN, as
  // in torch.
  FM_INLINE Vec<T> largest(const Act& act) {
    Vec<T> most = Act::kMonotone ? z[0] : act.value(z[0]);
    FM_UNROLL for (int k = 1; k < K; ++k) {
      const Vec<T> key = Act::kMonotone ? z[k] : act.value(z[k]);
      later[k] = (key > most) | (key != key);
      most = later[k] ? key : most;
    }
    return most;
  }
  // Of a vector for each pixel, that of the largest; after `largest`.
  FM_INLINE Vec<T> at_largest(const Vec<T> (&of)[K]) const {
    Vec<T> at = of[0];
    FM_UNROLL for (int k = 1; k < K; ++k) at = later[k] ? of[k] : at;
    return at;
  }
  // g at the largest pixel, 0 at the others.
  FM_INLINE void to_largest(Vec<T> g, Vec<T> (&to)[K]) const {
    FM_UNROLL for (int k = K - 1; k > 0; --k) {
      to[k] = later[k] ? g : Vec<T>{};
      g = later[k] ? Vec<T>{} : g;
    }
    to[0] = g;
  }
};

template <template <class, class, int> class Pass, class T, class Act>
FM_INLINE void run_with_activation(const cpu::NormBlock<T>& b) {
  const Act act(b);
  switch (b.pool) {
    case cpu::kNoPool: {
      Pass<T, Act, cpu::kNoPool> pass{b, act};
      return over_lines(b, pass);
    }
    case cpu::kMaxPool: {
      Pass<T, Act, cpu::kMaxPool> pass{b, act};
      return over_lines(b, pass);
    }
    default: {
      Pass<T, Act, cpu::kAveragePool> pass{b, act};
      return over_lines(b, pass);
    }
  }
}
template <template <class, class, int> class Pass, class T>
void run_pass(const cpu::NormBlock<T>& b) {
  switch (b.activation) {
    case cpu::kGelu: return run_with_activation<Pass, T, Gelu<T>>(b);
    case cpu::kSilu: return run_with_activation<Pass, T, Silu<T>>(b);
    default: return run_with_activation<Pass, T, PiecewiseLinear<T>>(b);
  }
}

}  // namespace fastmeta::FASTMETA_ISA
