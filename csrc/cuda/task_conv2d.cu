// Convolutions with each task's own weights, and their gradients.
#include "conv/gather.h"
#include "conv/weight_gradient.h"

namespace fastmeta::cuda {
namespace {

constexpr int kPackThreads = 128;

// Weights as a tile reads them: from [outputs, channels, taps] to [taps, channels, outputs], or with `for_data` to
// [taps, outputs, channels], each group by itself.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const T* weight, int64_t tasks, int64_t groups, int outputs, int channels, int taps, bool for_data,
                T* packed) {
  const int terms = for_data ? outputs : channels, columns = for_data ? channels : outputs;
  FM_EACH(row, x, groups * taps * terms) FM_EACH(tile, y, divide_up<int64_t>(columns, kPackThreads))
  FM_EACH(task, z, tasks) {
    const int64_t column = tile * kPackThreads + threadIdx.x, size = groups * taps * terms * columns;
    if (column >= columns) continue;
    const int64_t term = row % terms, tap = row / terms % taps, group = row / terms / taps;
    const int64_t output = for_data ? term : column, channel = for_data ? column : term;
    packed[task * size + row * columns + column] =
        weight[task * size + ((group * outputs + output) * channels + channel) * taps + tap];
  }
}

template <class T>
void launch_pack(const ConvShape& s, const ConvInput& weight, bool for_data, void* packed, void* stream) {
  const int64_t outputs = s.outputs / s.groups, channels = s.channels / s.groups, taps = s.kernel_h * s.kernel_w;
  const int64_t tasks = weight.task == 0 ? 1 : s.tasks, columns = for_data ? channels : outputs;
  const Grid grid{s.groups * taps * (for_data ? outputs : channels), divide_up<int64_t>(columns, kPackThreads), tasks};
  launch(pack_kernel<T>, grid, kPackThreads, 0, stream, static_cast<const T*>(weight.data), tasks, s.groups,
         int(outputs), int(channels), int(taps), for_data, static_cast<T*>(packed));
}

}  // namespace

void launch_task_conv2d(Dtype dtype, const TaskConv2d& p, void* stream) {
  const ConvShape& s = p.shape;
  ConvGather g{p.x.data, p.packed, p.bias.data, p.out};
  g.h = {int(s.height), int(s.out_height), int(s.kernel_h), int(s.stride_h), -int(s.pad_h), int(s.dilation_h), 1};
  g.w = {int(s.width), int(s.out_width), int(s.kernel_w), int(s.stride_w), -int(s.pad_w), int(s.dilation_w), 1};
  g.tasks = s.tasks;
  g.rows = s.rows;
  g.groups = s.groups;
  g.in_task = p.x.task;
  g.weight_task = p.weight.task;
  g.bias_task = p.bias.task;
  g.terms = int(s.channels / s.groups);
  g.columns = int(s.outputs / s.groups);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_pack<T>(s, p.weight, false, p.packed, stream);
    launch_conv_gather<T>(g, stream);
  });
}

void launch_task_conv2d_bwd_data(Dtype dtype, const TaskConv2dBwdData& p, void* stream) {
  const ConvShape& s = p.shape;
  ConvGather g{p.grad.data, p.packed, nullptr, p.out};
  g.h = {int(s.out_height), int(s.height), int(s.kernel_h), 1, int(s.pad_h), -int(s.dilation_h), int(s.stride_h)};
  g.w = {int(s.out_width), int(s.width), int(s.kernel_w), 1, int(s.pad_w), -int(s.dilation_w), int(s.stride_w)};
  g.tasks = s.tasks;
  g.rows = s.rows;
  g.groups = s.groups;
  g.in_task = p.grad.task;
  g.weight_task = p.weight.task;
  g.terms = int(s.outputs / s.groups);
  g.columns = int(s.channels / s.groups);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_pack<T>(s, p.weight, true, p.packed, stream);
    launch_conv_gather<T>(g, stream);
  });
}

void launch_task_conv2d_bwd_weight(Dtype dtype, const TaskConv2dBwdWeight& p, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_conv_weight_gradient<T>(p, stream);
  });
}

}  // namespace fastmeta::cuda
