// norm_act_pool over a block of lines: forward, and of both derivatives the sums that go through mean and variance, and
// the pass that writes. Each forms d = x - mean and z = d * scale + bias anew: rows 0 to 2 of the tables.
#pragma once

#include "conv/window.h"

namespace fastmeta::FASTMETA_ISA {

template <class T, class Act, int kPool>
struct NormForward {
  static constexpr int kVectors = Act::kVectors;
  const cpu::NormBlock<T>& b;
  const Act& act;

  template <int V, bool kTail>
  FM_INLINE void line(const Line& line, int64_t c, int64_t lanes) {
    constexpr int W = kWidth<T>, kStep = kPool == cpu::kNoPool ? 1 : 2;
    const int64_t channels = b.channels, row = b.width * channels;
    Vec<T> table[3][V];
    load_tables<T, V>(b, c, table);
    const T* x = b.x + line.in + c;
    T* out = b.out + line.out + c;
    for (int64_t j = 0; j < line.windows; ++j, x += kStep * channels, out += channels)
      FM_UNROLL for (int v = 0; v < V; ++v) {
        Window<T, Act, kPool> window;
        window.template read<kTail>(x + v * W, channels, row, lanes, table[0][v], table[1][v], table[2][v]);
        store_lanes<kTail>(out + v * W, window.value(act), lanes);
      }
  }
};

// The gradient g at z of each pixel of a window, from that of its output.
template <class T, class Act, int kPool>
FM_INLINE void gradient_at_pixels(Window<T, Act, kPool>& window, const Act& act, Vec<T> grad,
                                  Vec<T> (&g)[Window<T, Act, kPool>::K]) {
  if constexpr (kPool == cpu::kMaxPool) {
    window.largest(act);
    window.to_largest(act.times(grad, act.slope(window.at_largest(window.z))), g);
  } else {
    if (kPool == cpu::kAveragePool) grad *= T(0.25);
    FM_UNROLL for (int k = 0; k < window.K; ++k) g[k] = act.times(grad, act.slope(window.z[k]));
  }
}

// sums[0] += g, sums[1] += g d
template <class T, class Act, int kPool>
struct NormSums {
  static constexpr int kVectors = Act::kVectors;
  const cpu::NormBlock<T>& b;
  const Act& act;

  template <int V, bool kTail>
  FM_INLINE void line(const Line& line, int64_t c, int64_t lanes) {
    constexpr int W = kWidth<T>, kStep = kPool == cpu::kNoPool ? 1 : 2;
    const int64_t channels = b.channels, row = b.width * channels;
    Vec<T> table[3][V], sum[V] = {}, product[V] = {};
    load_tables<T, V>(b, c, table);
    const T *x = b.x + line.in + c, *grad = b.grad + line.out + c;
    for (int64_t j = 0; j < line.windows; ++j, x += kStep * channels, grad += channels)
      FM_UNROLL for (int v = 0; v < V; ++v) {
        Window<T, Act, kPool> window;
        window.template read<kTail>(x + v * W, channels, row, lanes, table[0][v], table[1][v], table[2][v]);
        const Vec<T> y = load_lanes<kTail>(grad + v * W, lanes);
        if constexpr (kPool == cpu::kMaxPool) {
          window.largest(act);
          const Vec<T> g = act.times(y, act.slope(window.at_largest(window.z)));
          sum[v] += g;
          product[v] += g * window.at_largest(window.d);
        } else {
          Vec<T> g[window.K];
          gradient_at_pixels(window, act, y, g);
          FM_UNROLL for (int k = 0; k < window.K; ++k) {
            sum[v] += g[k];
            product[v] += g[k] * window.d[k];
          }
        }
      }
    T* to = b.sums + c;
    FM_UNROLL for (int v = 0; v < V; ++v) {
      store(to + v * W, load(to + v * W) + sum[v]);
      store(to + b.padded + v * W, load(to + b.padded + v * W) + product[v]);
    }
  }
};

// f(offset of a pixel) for those of a line that the pool drops
template <class T, class F>
FM_INLINE void over_dropped(const cpu::NormBlock<T>& b, const Line& line, int kStep, const F& f) {
  for (int64_t i = 0; i < line.rows; ++i)
    for (int64_t j = line.windows * kStep; j < b.width; ++j) f(line.in + (i * b.width + j) * b.channels);
}

// d_x = scale g + table 3 + d table 4; where mean and variance are constants, scale g
template <class T, class Act, int kPool>
struct NormGradient {
  static constexpr int kVectors = Act::kVectors;
  const cpu::NormBlock<T>& b;
  const Act& act;

  template <int V, bool kTail>
  FM_INLINE void line(const Line& line, int64_t c, int64_t lanes) {
    if (b.constant)
      write<V, kTail, true>(line, c, lanes);
    else
      write<V, kTail, false>(line, c, lanes);
  }
  template <int V, bool kTail, bool kConstant>
  FM_INLINE void write(const Line& line, int64_t c, int64_t lanes) {
    constexpr int W = kWidth<T>, kStep = kPool == cpu::kNoPool ? 1 : 2;
    const int64_t channels = b.channels, row = b.width * channels;
    Vec<T> table[kConstant ? 3 : 5][V];
    load_tables<T, V>(b, c, table);
    const auto through_moments = [&](Vec<T> d, int v) __attribute__((always_inline)) {
      if constexpr (kConstant)
        return Vec<T>{};
      else
        return table[3][v] + d * table[4][v];
    };
    const T *x = b.x + line.in + c, *grad = b.grad + line.out + c;
    T* out = b.out + line.in + c;
    for (int64_t j = 0; j < line.windows; ++j, x += kStep * channels, out += kStep * channels, grad += channels)
      FM_UNROLL for (int v = 0; v < V; ++v) {
        Window<T, Act, kPool> window;
        window.template read<kTail>(x + v * W, channels, row, lanes, table[0][v], table[1][v], table[2][v]);
        Vec<T> g[window.K];
        gradient_at_pixels(window, act, load_lanes<kTail>(grad + v * W, lanes), g);
        FM_UNROLL for (int k = 0; k < window.K; ++k)
          store_lanes<kTail>(out + k % 2 * channels + k / 2 * row + v * W,
                             table[1][v] * g[k] + through_moments(window.d[k], v), lanes);
      }
    over_dropped(b, line, kStep, [&](int64_t at) __attribute__((always_inline)) {
      FM_UNROLL for (int v = 0; v < V; ++v)
        store_lanes<kTail>(b.out + at + c + v * W,
                           through_moments(load_lanes<kTail>(b.x + at + c + v * W, lanes) - table[0][v], v), lanes);
    });
  }
};

// ---- the gradient of the gradient

// Sums for the means that go through the moments, with v the gradient of d_x:  v, v d, g, g d, v g;  of activations with
// a second derivative also of t = grad * act'':  t, t d, t d d, t v, t v d.
template <class T, class Act, int kPool>
struct NormSecondSums {
  static constexpr int kVectors = 1, kSums = Act::kCurved ? 10 : 5;
  const cpu::NormBlock<T>& b;
  const Act& act;

  template <int V, bool kTail>
  FM_INLINE void line(const Line& line, int64_t c, int64_t lanes) {
    constexpr int kStep = kPool == cpu::kNoPool ? 1 : 2;
    const int64_t channels = b.channels, row = b.width * channels;
    Vec<T> table[3][1], sum[kSums] = {};
    load_tables<T, 1>(b, c, table);
    const T *x = b.x + line.in + c, *grad = b.grad + line.out + c, *outer = b.outer + line.in + c;
    const auto add = [&](Vec<T> v, Vec<T> d, Vec<T> y, Vec<T> z) __attribute__((always_inline)) {
      const Vec<T> g = act.times(y, act.slope(z));
      sum[2] += g;
      sum[3] += g * d;
      sum[4] += v * g;
      if constexpr (Act::kCurved) {
        const Vec<T> t = y * act.second(z);
        sum[5] += t;
        sum[6] += t * d;
        sum[7] += t * d * d;
        sum[8] += t * v;
        sum[9] += t * v * d;
      }
    };
    const auto add_outer = [&](Vec<T> v, Vec<T> d) __attribute__((always_inline)) {
      sum[0] += v;
      sum[1] += v * d;
    };
    for (int64_t j = 0; j < line.windows; ++j, x += kStep * channels, grad += channels, outer += kStep * channels) {
      Window<T, Act, kPool> window;
      window.template read<kTail>(x, channels, row, lanes, table[0][0], table[1][0], table[2][0]);
      Vec<T> y = load_lanes<kTail>(grad, lanes), v[window.K] = {};
      if (b.outer)
        FM_UNROLL for (int k = 0; k < window.K; ++k) {
          v[k] = load_lanes<kTail>(outer + k % 2 * channels + k / 2 * row, lanes);
          add_outer(v[k], window.d[k]);
        }
      if constexpr (kPool == cpu::kMaxPool) {
        window.largest(act);
        add(window.at_largest(v), window.at_largest(window.d), y, window.at_largest(window.z));
      } else {
        if (kPool == cpu::kAveragePool) y *= T(0.25);
        FM_UNROLL for (int k = 0; k < window.K; ++k) add(v[k], window.d[k], y, window.z[k]);
      }
    }
    if (b.outer)
      over_dropped(b, line, kStep, [&](int64_t at) __attribute__((always_inline)) {
        add_outer(load_lanes<kTail>(b.outer + at + c, lanes), load_lanes<kTail>(b.x + at + c, lanes) - table[0][0]);
      });
    FM_UNROLL for (int k = 0; k < kSums; ++k) {
      T* to = b.sums + k * b.padded + c;
      store(to, load(to) + sum[k]);
    }
  }
};

// With q = scale v + d table 3 + table 4, the gradient of g:  d_grad = q act' at the outputs' pixels, and
// d_x = table 5 v + table 3 g + scale q t + table 6 + d table 7.
template <class T, class Act, int kPool>
struct NormSecond {
  static constexpr int kVectors = 1;
  const cpu::NormBlock<T>& b;
  const Act& act;

  template <int V, bool kTail>
  FM_INLINE void line(const Line& line, int64_t c, int64_t lanes) {
    constexpr int kStep = kPool == cpu::kNoPool ? 1 : 2, K = Window<T, Act, kPool>::K;
    const int64_t channels = b.channels, row = b.width * channels;
    Vec<T> table[8][1];
    load_tables<T, 1>(b, c, table);
    const Vec<T> scale = table[1][0];
    const T *x = b.x + line.in + c, *grad = b.grad + line.out + c, *outer = b.outer + line.in + c;
    T *out = b.out + line.in + c, *d_grad = b.d_grad + line.out + c;
    // what mean and variance add to d_x; nothing where they are constants
    const auto through_moments = [&](Vec<T> v, Vec<T> d) __attribute__((always_inline)) {
      return b.constant ? Vec<T>{} : table[5][0] * v + table[6][0] + d * table[7][0];
    };
    const auto pull = [&](Vec<T> v, Vec<T> d) __attribute__((always_inline)) {
      return scale * v + d * table[3][0] + table[4][0];
    };
    const auto direct_part = [&](Vec<T> g, Vec<T> y, Vec<T> q, Vec<T> z) __attribute__((always_inline)) {
      const Vec<T> through_g = table[3][0] * g;
      if constexpr (Act::kCurved)
        return through_g + scale * q * (y * act.second(z));
      else
        return through_g;
    };
    for (int64_t j = 0; j < line.windows; ++j) {
      Window<T, Act, kPool> window;
      window.template read<kTail>(x, channels, row, lanes, table[0][0], table[1][0], table[2][0]);
      Vec<T> y = load_lanes<kTail>(grad, lanes), v[K] = {}, direct[K], of_grad;
      if (b.outer)
        FM_UNROLL for (int k = 0; k < K; ++k) v[k] = load_lanes<kTail>(outer + k % 2 * channels + k / 2 * row, lanes);
      if constexpr (kPool == cpu::kMaxPool) {
        window.largest(act);
        const Vec<T> z = window.at_largest(window.z);
        const auto slope = act.slope(z);
        const Vec<T> q = pull(window.at_largest(v), window.at_largest(window.d));
        of_grad = act.times(q, slope);
        window.to_largest(direct_part(act.times(y, slope), y, q, z), direct);
      } else {
        constexpr T part = kPool == cpu::kAveragePool ? T(0.25) : T(1);
        y *= part;
        of_grad = Vec<T>{};
        FM_UNROLL for (int k = 0; k < K; ++k) {
          const Vec<T> q = pull(v[k], window.d[k]);
          const auto slope = act.slope(window.z[k]);
          of_grad += act.times(part * q, slope);
          direct[k] = direct_part(act.times(y, slope), y, q, window.z[k]);
        }
      }
      if (b.d_grad) store_lanes<kTail>(d_grad, of_grad, lanes);
      if (b.out)
        FM_UNROLL for (int k = 0; k < K; ++k)
          store_lanes<kTail>(out + k % 2 * channels + k / 2 * row, direct[k] + through_moments(v[k], window.d[k]), lanes);
      x += kStep * channels, grad += channels, outer += kStep * channels, out += kStep * channels, d_grad += channels;
    }
    if (b.out)
      over_dropped(b, line, kStep, [&](int64_t at) __attribute__((always_inline)) {
        const Vec<T> v = b.outer ? load_lanes<kTail>(b.outer + at + c, lanes) : Vec<T>{};
        store_lanes<kTail>(b.out + at + c, through_moments(v, load_lanes<kTail>(b.x + at + c, lanes) - table[0][0]), lanes);
      });
  }
};

template <class T>
void norm_forward(const cpu::NormBlock<T>& b) {
  run_pass<NormForward, T>(b);
}
template <class T>
void norm_sums(const cpu::NormBlock<T>& b) {
  run_pass<NormSums, T>(b);
}
template <class T>
void norm_gradient(const cpu::NormBlock<T>& b) {
  run_pass<NormGradient, T>(b);
}
template <class T>
void norm_second_sums(const cpu::NormBlock<T>& b) {
  run_pass<NormSecondSums, T>(b);
}
template <class T>
void norm_second(const cpu::NormBlock<T>& b) {
  run_pass<NormSecond, T>(b);
}

}  // namespace fastmeta::FASTMETA_ISA
