// Norm, activation and pool in one pass, the norm's moments, and two orders of gradients.
#include "conv/moments.h"
#include "conv/norm_curve.h"

namespace fastmeta::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kNormThreads, 3) norm_act_pool_kernel(NormActPool p, Pieces pieces, T* out) {
  using A = Acc<T>;
  FM_EACH_PIECE(unit, piece, channel, p, pieces) {
    if (channel >= p.channels) continue;
    const Scale<A> s = scale_of<T>(p, unit, channel);
    each_window(p, unit, piece, channel, pieces, [&](const Window& w) {
      if (!w.whole) return;
      const Pixels<A> pixels(p, s, w, static_cast<const T*>(p.x));
      A y[kWindow];
#pragma unroll
      for (int k = 0; k < kWindow; ++k) y[k] = pixels.y[k].value;
      store(out + w.pooled, pixels.pooled(y));
    });
  }
}

// d_x from the means of `NormScratch`
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_bwd_kernel(NormActPool p, const T* grad, const Acc<T>* means, Pieces pieces, T* d_x) {
  using A = Acc<T>;
  FM_EACH_PIECE(unit, piece, channel, p, pieces) {
    if (channel >= p.channels) continue;
    const Scale<A> s = scale_of<T>(p, unit, channel);
    const NormMeans<A> mean(p, unit, channel, means);
    each_window(p, unit, piece, channel, pieces, [&](const Window& w) {
      const Pixels<A> pixels(p, s, w, static_cast<const T*>(p.x));
      const A from = w.whole ? load(grad + w.pooled) : A(0);
#pragma unroll
      for (int k = 0; k < kWindow; ++k) {
        if (!w.inside[k]) continue;
        const A h = s.weight * pixels.routed(from, k) * pixels.y[k].slope;
        store(d_x + w.at(k), s.rstd * (has_statistics(p) ? h - mean.g - pixels.n[k] * mean.gn : h));
      }
    });
  }
}

// What a parameter gets, from sums [units, count, channels]: of its task's units, or of all.
template <class T>
void launch_parameter(const NormActPool& p, const ConvOutput& to, const Acc<T>* sums, int64_t count, void* stream) {
  if (!to.data) return;
  const int64_t tasks = to.shared ? 1 : p.tasks;
  launch_add_groups<T>(sums, tasks, to.shared ? p.units() : p.units_each, p.channels, to.data, stream,
                       count * p.channels);
}

}  // namespace

void launch_norm_moments(Dtype dtype, const NormMoments& p, void* stream) {
  by_dtype(dtype, [&](auto type) { launch_moments<typename decltype(type)::type>(p, stream); });
}

void launch_norm_act_pool(Dtype dtype, const NormActPool& p, void* out, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(norm_act_pool_kernel<T>, norm_grid(p), kNormThreads, 0, stream, p, pieces_of(p.windows()),
           static_cast<T*>(out));
  });
}

void launch_norm_act_pool_bwd(Dtype dtype, const NormActPoolBwd& b, void* stream) {
  const NormActPool& p = b.forward;
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const NormScratch<Acc<T>> scratch(p, b.scratch, kBwdSums);
    if ((b.d_x && has_statistics(p)) || b.d_weight.data || b.d_bias.data)
      launch_norm_sums<T, kBwdSums>(p, b.grad, nullptr, scratch, stream);
    launch_parameter<T>(p, b.d_bias, scratch.sums, kBwdSums, stream);
    launch_parameter<T>(p, b.d_weight, scratch.sums + p.channels, kBwdSums, stream);
    if (b.d_x)
      launch(norm_bwd_kernel<T>, norm_grid(p), kNormThreads, 0, stream, p, static_cast<const T*>(b.grad),
             static_cast<const Acc<T>*>(scratch.means), pieces_of(p.windows()), static_cast<T*>(b.d_x));
  });
}

void launch_norm_act_pool_bwd_bwd(Dtype dtype, const NormActPoolBwdBwd& b, void* stream) {
  const NormActPool& p = b.forward;
  const int64_t count = b.outer ? kBwdBwdSums : kBwdSums;
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const NormScratch<A> scratch(p, b.scratch, kBwdBwdSums);
    const Pieces pieces = pieces_of(p.windows());
    if (b.outer)
      launch_norm_sums<T, kBwdBwdSums>(p, b.grad, b.outer, scratch, stream);
    else
      launch_norm_sums<T, kBwdSums>(p, b.grad, nullptr, scratch, stream);
    if (is_curved(p)) {
      launch(norm_curve_sums_kernel<T>, norm_grid(p), kNormThreads, 0, stream, b, static_cast<const A*>(scratch.means),
             pieces, scratch.partial);
      launch_add_groups<A>(scratch.partial, p.units(), pieces.count, 2 * p.channels, scratch.curve_sums, stream);
    }
    launch(norm_row_kernel<T>, {p.units(), divide_up<int64_t>(p.groups, kMeansThreads)}, kMeansThreads, 0, stream, b,
           scratch, int(count), p.pixels());
    launch_parameter<T>(p, b.d_weight, scratch.parameters, 2, stream);
    launch_parameter<T>(p, b.d_bias, scratch.parameters + p.channels, 2, stream);
    if (b.d_x || b.d_grad)
      launch(norm_bwd_bwd_kernel<T>, norm_grid(p), kNormThreads, 0, stream, b, static_cast<const A*>(scratch.means),
             static_cast<const A*>(scratch.row), pieces);
  });
}

}  // namespace fastmeta::cuda
