// The gradients of the norm's gradient. With the names of norm_sums.h, `a` the mean of v n and `b` that of weight g n:
//   at g:   t = weight rstd (v - mean v - n a) + outer_weight n + outer_bias
//   at z, through the activation's second derivative:   q = t * (gradient at y) * act''(z)
//   at n:   h = outer_weight g + weight q - rstd (v b + weight g a)
//   at rstd:   s = sum of weight (v g - g mean v - g n a)
//   d_x = rstd (h - mean h - n mean(h n)) - n s rstd^2 / N
#pragma once

#include "norm_sums.h"

namespace fastmeta::cuda {

// Means of a unit's group, as norm_sums.h finds them, all 0 where there are no statistics.
template <class A>
struct NormMeans {
  A g = 0, gn = 0, v = 0, vn = 0;
  __device__ __forceinline__ NormMeans(const NormActPool& p, int64_t unit, int64_t channel, const A* means) {
    if (!has_statistics(p)) return;
    const A* of = means + (unit * p.groups + channel / (p.channels / p.groups)) * 4;
    g = of[0];
    gn = of[1];
    v = of[2];
    vn = of[3];
  }
};

// What does not change from pixel to pixel.
template <class T>
struct OuterChannel {
  using A = Acc<T>;
  Scale<A> s;
  NormMeans<A> mean;
  A weight, bias;  // cotangents of theirs
  bool weighted, statistics, curved;

  __device__ __forceinline__ OuterChannel(const NormActPoolBwdBwd& p, int64_t unit, int64_t channel, const A* means)
      : s(scale_of<T>(p.forward, unit, channel)),
        mean(p.forward, unit, channel, means),
        weight(channel_of<T>(p.outer_weight, unit / p.forward.units_each, channel, 0)),
        bias(channel_of<T>(p.outer_bias, unit / p.forward.units_each, channel, 0)),
        weighted(p.outer_weight.data),
        statistics(has_statistics(p.forward)),
        curved(is_curved(p.forward)) {}

  __device__ __forceinline__ A at_g(A v, A n) const {
    const A of_x = statistics ? v - mean.v - n * mean.vn : v;
    return s.weight * s.rstd * of_x + (weighted ? weight * n : A(0)) + bias;
  }
  __device__ __forceinline__ A at_n(A v, A g, A q) const {
    const A h = weight * g + s.weight * q;
    return statistics ? h - s.rstd * (v * mean.gn + s.weight * g * mean.vn) : h;
  }
};

// curve_sums [units, 2, channels]: of q, q n
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_curve_sums_kernel(NormActPoolBwdBwd b, const Acc<T>* means, Pieces pieces, Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A parts[kSumRows][kSumColumns];
  const NormActPool& p = b.forward;
  const T* outer = static_cast<const T*>(b.outer);
  FM_EACH_PIECE(unit, piece, channel, p, pieces) {
    A sum[2] = {};
    if (channel < p.channels) {
      const OuterChannel<T> o(b, unit, channel, means);
      each_window(p, unit, piece, channel, pieces, [&](const Window& w) {
        if (!w.whole) return;
        const Pixels<A> pixels(p, o.s, w, static_cast<const T*>(p.x));
        const A from = load(static_cast<const T*>(b.grad) + w.pooled);
#pragma unroll
        for (int k = 0; k < kWindow; ++k) {
          if (!w.inside[k]) continue;
          const A v = outer ? load(outer + w.at(k)) : A(0);
          const A q = o.at_g(v, pixels.n[k]) * pixels.routed(from, k) * pixels.y[k].bend;
          sum[0] += q;
          sum[1] += q * pixels.n[k];
        }
      });
    }
    put_sums(parts, sum, unit * pieces.count + piece, channel, p.channels, partial);
  }
}

// What d_x needs of a group, [units, groups, 3]: mean h, mean h n, s rstd^2 / N; and by unit and channel what weight
// and bias get, [units, 2, channels]. A thread owns a group.
template <class T>
__global__ void __launch_bounds__(kMeansThreads)
    norm_row_kernel(NormActPoolBwdBwd b, NormScratch<Acc<T>> in, int count, int64_t pixels) {
  using A = Acc<T>;
  const NormActPool& p = b.forward;
  const int64_t each = p.channels / p.groups;
  FM_EACH(unit, x, p.tasks * p.units_each) FM_EACH(tile, y, divide_up<int64_t>(p.groups, kMeansThreads)) {
    const int64_t group = tile * kMeansThreads + threadIdx.x;
    if (group >= p.groups) continue;
    A h = 0, hn = 0, s = 0, rstd = 0, mean_h = 0, mean_hn = 0;
    for (int64_t channel = group * each; channel < (group + 1) * each; ++channel) {
      const OuterChannel<T> o(b, unit, channel, in.means);
      const A* sums = in.sums + unit * count * p.channels + channel;
      const A* curve = in.curve_sums + unit * 2 * p.channels + channel;
      const A g = sums[0], gn = sums[p.channels], vg = count > kBwdSums ? sums[4 * p.channels] : A(0);
      const A q = o.curved ? curve[0] : A(0), qn = o.curved ? curve[p.channels] : A(0);
      const A of_weight = o.statistics ? vg - o.mean.v * g - o.mean.vn * gn : vg;
      rstd = o.s.rstd;
      s += o.s.weight * of_weight;
      h += o.weight * g + o.s.weight * q;
      hn += o.weight * gn + o.s.weight * qn;
      mean_h = -rstd * (o.mean.v * o.mean.gn + o.mean.vn * o.mean.g);
      mean_hn = A(-2) * rstd * o.mean.vn * o.mean.gn;
      A* parameters = in.parameters + unit * 2 * p.channels + channel;
      parameters[0] = (pixels > 0 ? rstd * of_weight : A(0)) + qn;
      parameters[p.channels] = q;
    }
    const A n = A(pixels * each);
    A* row = in.row + (unit * p.groups + group) * 3;
    row[0] = mean_h + h / n;
    row[1] = mean_hn + hn / n;
    row[2] = s * rstd * rstd / n;
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_bwd_bwd_kernel(NormActPoolBwdBwd b, const Acc<T>* means, const Acc<T>* rows, Pieces pieces) {
  using A = Acc<T>;
  const NormActPool& p = b.forward;
  const T* outer = static_cast<const T*>(b.outer);
  T *d_x = static_cast<T*>(b.d_x), *d_grad = static_cast<T*>(b.d_grad);
  FM_EACH_PIECE(unit, piece, channel, p, pieces) {
    if (channel >= p.channels) continue;
    const OuterChannel<T> o(b, unit, channel, means);
    const A* row = rows + (unit * p.groups + channel / (p.channels / p.groups)) * 3;
    each_window(p, unit, piece, channel, pieces, [&](const Window& w) {
      const Pixels<A> pixels(p, o.s, w, static_cast<const T*>(p.x));
      const A from = w.whole ? load(static_cast<const T*>(b.grad) + w.pooled) : A(0);
      A at_y[kWindow] = {};
#pragma unroll
      for (int k = 0; k < kWindow; ++k) {
        if (!w.inside[k]) continue;
        const A n = pixels.n[k], v = outer ? load(outer + w.at(k)) : A(0), routed = pixels.routed(from, k);
        const A at_g = o.at_g(v, n);
        at_y[k] = at_g * pixels.y[k].slope;
        if (!d_x) continue;
        const A h = o.at_n(v, routed * pixels.y[k].slope, o.curved ? at_g * routed * pixels.y[k].bend : A(0));
        store(d_x + w.at(k), o.statistics ? o.s.rstd * (h - row[0] - n * row[1]) - n * row[2] : o.s.rstd * h);
      }
      if (d_grad && w.whole) store(d_grad + w.pooled, pixels.pooled(at_y));
    });
  }
}

}  // namespace fastmeta::cuda
