// The launchers of the ops of convolutional inner loops, free of torch as those of launch.h. Images are channels last.
#pragma once

#include "launch.h"

namespace fastmeta::cuda {

// x [tasks, rows, height, width, channels], y [tasks, rows, out_height, out_width, outputs],
// weight [tasks, outputs, channels / groups, kernel_h, kernel_w]
struct ConvShape {
  int64_t tasks, rows, height, width, channels, outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};
struct ConvInput {
  const void* data;
  int64_t task;  // elements from task to task, 0 where all share it
};

// `packed`: scratch of the weight's size, in which the channels that a kernel writes lie next to each other.
struct TaskConv2d {
  ConvShape shape;
  ConvInput x, weight, bias;  // bias.data: nullptr where there is none
  void* packed;
  void* out;
};
void launch_task_conv2d(Dtype dtype, const TaskConv2d& p, void* stream);

struct TaskConv2dBwdData {
  ConvShape shape;
  ConvInput grad, weight;
  void* packed;
  void* out;
};
void launch_task_conv2d_bwd_data(Dtype dtype, const TaskConv2dBwdData& p, void* stream);

struct TaskConv2dBwdWeight {
  ConvShape shape;
  ConvInput grad, x;
  void* sums;  // scratch in the accumulation type: `conv_pieces` times the size of `out`, where there are several
  void* out;   // [tasks, ...]
};
void launch_task_conv2d_bwd_weight(Dtype dtype, const TaskConv2dBwdWeight& p, void* stream);

constexpr int64_t kConvTile = 64;
// Into how many sums over pixels a weight's gradient is split, so that few small weights keep many blocks busy.
inline int64_t conv_pieces(const ConvShape& s) {
  const auto tiles = [](int64_t size) { return (size + kConvTile - 1) / kConvTile; };
  const int64_t each = s.channels / s.groups * s.kernel_h * s.kernel_w;
  const int64_t blocks = tiles(s.outputs / s.groups) * tiles(each) * s.groups * s.tasks;
  const int64_t long_enough = (s.rows * s.out_height * s.out_width + 255) / 256;
  const int64_t wanted = blocks > 0 ? (1024 + blocks - 1) / blocks : 1;
  const int64_t pieces = wanted < long_enough ? wanted : long_enough;
  return pieces < 1 ? 1 : pieces > 64 ? 64 : pieces;
}

// norm_moments: x [units, pixels, channels], mean and var [units, groups] in the accumulation type. A unit is what has
// moments of its own: a task, or a row of one.
struct NormMoments {
  const void* x;
  int64_t units, pixels, channels, groups;
  void* scratch;  // accumulation type, `scratch_size`
  void* mean;
  void* var;

  int64_t scratch_size() const { return units * sum_count(pixels) * 2 * channels; }
};
void launch_norm_moments(Dtype dtype, const NormMoments& p, void* stream);

// The numbers are those that Python hands over: never reorder.
enum class Norm : int { none, batch, group, given };
enum class Pool : int { none, max, average };

// norm_act_pool: x [tasks, rows, height, width, channels], weight and bias [tasks, channels], mean and var [tasks,
// units_each, groups] in the accumulation type
struct NormActPool {
  const void* x;
  ConvInput weight, bias, mean, var;  // data: nullptr where there is none
  int64_t tasks, rows, height, width, channels;
  int64_t units_each, groups;  // units of a task, groups of channels that have moments
  Norm norm;
  Activation activation;
  Pool pool;
  double eps, slope;

  int64_t units() const { return tasks * units_each; }
  int64_t pool_size() const { return pool == Pool::none ? 1 : 2; }
  int64_t pixels() const { return units_each > 0 ? rows / units_each * height * width : 0; }  // of a unit
  // what a pool takes together, and what is left of it at an odd edge
  int64_t windows() const {
    const int64_t size = pool_size(), images = units_each > 0 ? rows / units_each : 0;
    return images * ((height + size - 1) / size) * ((width + size - 1) / size);
  }
  // of a gradient, which takes `sums` sums over pixels, in the accumulation type
  int64_t scratch_size(int64_t sums) const { return units() * channels * (sum_count(windows()) * sums + sums + 11); }
};
void launch_norm_act_pool(Dtype dtype, const NormActPool& p, void* out, void* stream);

// What a shared tensor gets is the sum over the tasks.
struct ConvOutput {
  void* data;  // nullptr: not wanted
  bool shared;
};
struct NormActPoolBwd {
  NormActPool forward;
  const void* grad;
  void* d_x;  // or nullptr
  ConvOutput d_weight, d_bias;
  void* scratch;  // scratch_size(kBwdSums)
};
constexpr int64_t kBwdSums = 2, kBwdBwdSums = 5;
void launch_norm_act_pool_bwd(Dtype dtype, const NormActPoolBwd& p, void* stream);

// The gradients of a gradient: `outer` is the cotangent of its d_x, `outer_weight` that of its d_weight, `outer_bias`
// that of its d_bias; no data: zeros.
struct NormActPoolBwdBwd {
  NormActPool forward;
  ConvInput outer_weight, outer_bias;
  const void* outer;
  const void* grad;
  void* d_grad;  // or nullptr
  void* d_x;     // or nullptr
  ConvOutput d_weight, d_bias;
  void* scratch;  // scratch_size(kBwdBwdSums)
};
void launch_norm_act_pool_bwd_bwd(Dtype dtype, const NormActPoolBwdBwd& p, void* stream);

}  // namespace fastmeta::cuda
