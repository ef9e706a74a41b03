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

}  // namespace fastmeta::cuda
