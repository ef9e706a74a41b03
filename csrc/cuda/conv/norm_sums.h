// The sums over pixels that the gradients of a norm need: by pieces, then by unit, then as means over what was normed.
// With g the gradient at z, v the cotangent of d_x (`outer`), n the normed x:
//   sums [units, 2 or 5, channels]: of g, g n; v, v n, v g
//   means [units, groups, 4]: of weight g, weight g n; v, v n
#pragma once

#include "window.h"

namespace fastmeta::cuda {

// Where in its scratch a gradient keeps what; `sums` quantities are summed.
template <class A>
struct NormScratch {
  A *partial, *sums, *means;
  A *curve_sums, *row, *parameters;  // of the second derivative alone: norm_curve.h
  NormScratch(const NormActPool& p, void* scratch, int64_t count) {
    const int64_t each = p.units() * p.channels;
    partial = static_cast<A*>(scratch);
    sums = partial + each * sum_count(p.windows()) * count;
    means = sums + each * count;
    curve_sums = means + each * 4;
    row = curve_sums + each * 2;
    parameters = row + each * 3;
  }
};

// to [units, pieces, kCount, channels]
template <int kCount, class A>
__device__ __forceinline__ void put_sums(A (&parts)[kSumRows][kSumColumns], const A (&sum)[kCount], int64_t part,
                                         int64_t channel, int64_t channels, A* to) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A all = add_rows(parts, sum[i]);
    if (int(threadIdx.x) < kSumColumns && channel < channels) to[(part * kCount + i) * channels + channel] = all;
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_sums_kernel(NormActPool p, const T* grad, const T* outer, Pieces pieces, Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A parts[kSumRows][kSumColumns];
  FM_EACH_PIECE(unit, piece, channel, p, pieces) {
    A sum[kCount] = {};
    if (channel < p.channels) {
      const Scale<A> s = scale_of<T>(p, unit, channel);
      each_window(p, unit, piece, channel, pieces, [&](const Window& w) {
        const Pixels<A> pixels(p, s, w, static_cast<const T*>(p.x));
        const A from = w.whole ? load(grad + w.pooled) : A(0);
#pragma unroll
        for (int k = 0; k < kWindow; ++k) {
          if (!w.inside[k]) continue;
          const A g = pixels.routed(from, k) * pixels.y[k].slope, n = pixels.n[k];
          sum[0] += g;
          sum[1] += g * n;
          if constexpr (kCount > 2) {
            const A v = load(outer + w.at(k));
            sum[2] += v;
            sum[3] += v * n;
            sum[4] += v * g;
          }
        }
      });
    }
    put_sums(parts, sum, unit * pieces.count + piece, channel, p.channels, partial);
  }
}

constexpr int kMeansThreads = 128;

// A thread owns a group of channels; groups without statistics need none of this.
template <class T>
__global__ void __launch_bounds__(kMeansThreads) norm_means_kernel(NormActPool p, const Acc<T>* sums, int count,
                                                                   int64_t pixels, Acc<T>* means) {
  using A = Acc<T>;
  const int64_t each = p.channels / p.groups;
  FM_EACH(unit, x, p.tasks * p.units_each) FM_EACH(tile, y, divide_up<int64_t>(p.groups, kMeansThreads)) {
    const int64_t group = tile * kMeansThreads + threadIdx.x, task = unit / p.units_each;
    if (group >= p.groups) continue;
    A total[4] = {};
    for (int64_t channel = group * each; channel < (group + 1) * each; ++channel) {
      const A* of = sums + unit * count * p.channels + channel;
      const A weight = channel_of<T>(p.weight, task, channel, 1);
      total[0] += weight * of[0];
      total[1] += weight * of[p.channels];
      if (count <= kBwdSums) continue;
      total[2] += of[2 * p.channels];
      total[3] += of[3 * p.channels];
    }
    for (int i = 0; i < 4; ++i)
      means[(unit * p.groups + group) * 4 + i] = pixels > 0 ? total[i] / A(pixels * each) : A(0);
  }
}

// sums, and where x has statistics of its own means, of `count` quantities
template <class T, int kCount>
void launch_norm_sums(const NormActPool& p, const void* grad, const void* outer, const NormScratch<Acc<T>>& to,
                      void* stream) {
  const Pieces pieces = pieces_of(p.windows());
  launch(norm_sums_kernel<T, kCount>, norm_grid(p), kNormThreads, 0, stream, p, static_cast<const T*>(grad),
         static_cast<const T*>(outer), pieces, to.partial);
  launch_add_groups<Acc<T>>(to.partial, p.units(), pieces.count, kCount * p.channels, to.sums, stream);
  if (!has_statistics(p)) return;
  launch(norm_means_kernel<T>, {p.units(), divide_up<int64_t>(p.groups, kMeansThreads)}, kMeansThreads, 0, stream, p,
         to.sums, kCount, p.pixels(), to.means);
}

}  // namespace fastmeta::cuda
