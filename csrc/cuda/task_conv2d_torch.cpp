// task_conv2d and its gradients on CUDA tensors.
#include "bridge.h"

#include <fastmeta/launch_conv.h>

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "task_conv2d";

struct Geometry {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// How many tasks tensors have, of which each is of all tasks or shared by them.
class Tasks {
 public:
  ConvInput input(const Tensor& like, const Tensor& t, int64_t dims) {
    check_tensor(kOp, like, t, dims);
    const int64_t own = t.size(0);
    STD_TORCH_CHECK(own == 1 || count == 1 || own == count, kOp, ": tensors of ", count, " and of ", own, " tasks");
    if (own != 1) count = own;
    return {t.const_data_ptr(), own == 1 ? 0 : own == 0 ? 1 : t.numel() / own};
  }
  int64_t count = 1;
};

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// From the sizes of images [.., rows, height, width, channels] and of weights [.., outputs, channels of a group, ..].
ConvShape shape_of(int64_t tasks, int64_t rows, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                   int64_t kernel_h, int64_t kernel_w, const Geometry& g) {
  STD_TORCH_CHECK(g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 && g.dilation_w > 0 && g.pad_h >= 0 &&
                      g.pad_w >= 0 && kernel_h > 0 && kernel_w > 0,
                  kOp, ": kernel, stride and dilation must be positive, padding not negative");
  constexpr int64_t kMost = 1 << 30;  // what a kernel counts in an int
  STD_TORCH_CHECK((height + 2 * g.pad_h) * (width + 2 * g.pad_w) < kMost && channels * kernel_h * kernel_w < kMost &&
                      outputs * kernel_h * kernel_w < kMost,
                  kOp, ": images or kernels of 2^30 numbers");
  STD_TORCH_CHECK(g.groups > 0 && channels % g.groups == 0 && outputs % g.groups == 0, kOp, ": ", channels, " and ",
                  outputs, " channels in ", g.groups, " groups");
  const int64_t out_height = out_size(height, kernel_h, g.stride_h, g.pad_h, g.dilation_h);
  const int64_t out_width = out_size(width, kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  STD_TORCH_CHECK(out_height > 0 && out_width > 0, kOp, ": the kernel is larger than the padded images");
  return {tasks,    rows,       height,     width,   channels, outputs,      out_height,   out_width, kernel_h,
          kernel_w, g.stride_h, g.stride_w, g.pad_h, g.pad_w,  g.dilation_h, g.dilation_w, g.groups};
}

void check_grad(const Tensor& grad, const ConvShape& s) {
  STD_TORCH_CHECK(grad.size(1) == s.rows && grad.size(2) == s.out_height && grad.size(3) == s.out_width &&
                      grad.size(4) == s.outputs,
                  kOp, ": the gradient is not of the output's shape");
}

Tensor task_conv2d(Tensor x, Tensor weight, std::vector<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                   int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  Tasks tasks;
  TaskConv2d p{};
  p.x = tasks.input(x, x, 5);
  p.weight = tasks.input(x, weight, 5);
  if (!bias.empty()) p.bias = tasks.input(x, bias[0], 2);
  p.shape = shape_of(tasks.count, x.size(1), x.size(2), x.size(3), x.size(4), weight.size(1), weight.size(3),
                     weight.size(4), {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups});
  const ConvShape& s = p.shape;
  STD_TORCH_CHECK(weight.size(2) * groups == s.channels, kOp, ": weights of ", weight.size(2) * groups,
                  " channels, images of ", s.channels);
  STD_TORCH_CHECK(bias.empty() || bias[0].size(1) == s.outputs, kOp, ": bias is not of ", s.outputs, " channels");
  const OnDevice device(x);
  Tensor packed = new_tensor(x, {weight.numel()});
  Tensor out = new_tensor(x, {s.tasks, s.rows, s.out_height, s.out_width, s.outputs});
  p.packed = packed.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  launch_task_conv2d(dtype_of(kOp, x), p, device.stream);
  device.check(kOp);
  return out;
}

Tensor task_conv2d_bwd_data(Tensor grad, Tensor weight, int64_t height, int64_t width, int64_t stride_h,
                            int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                            int64_t groups) {
  Tasks tasks;
  TaskConv2dBwdData p{};
  p.grad = tasks.input(grad, grad, 5);
  p.weight = tasks.input(grad, weight, 5);
  p.shape = shape_of(tasks.count, grad.size(1), height, width, weight.size(2) * groups, weight.size(1), weight.size(3),
                     weight.size(4), {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups});
  const ConvShape& s = p.shape;
  check_grad(grad, s);
  const OnDevice device(grad);
  Tensor packed = new_tensor(grad, {weight.numel()});
  Tensor out = new_tensor(grad, {s.tasks, s.rows, s.height, s.width, s.channels});
  p.packed = packed.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  launch_task_conv2d_bwd_data(dtype_of(kOp, grad), p, device.stream);
  device.check(kOp);
  return out;
}

Tensor task_conv2d_bwd_weight(Tensor grad, Tensor x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                              int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                              int64_t groups) {
  Tasks tasks;
  TaskConv2dBwdWeight p{};
  p.grad = tasks.input(grad, grad, 5);
  p.x = tasks.input(grad, x, 5);
  p.shape = shape_of(tasks.count, x.size(1), x.size(2), x.size(3), x.size(4), grad.size(4), kernel_h, kernel_w,
                     {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups});
  const ConvShape& s = p.shape;
  check_grad(grad, s);
  const OnDevice device(grad);
  Tensor out = new_tensor(grad, {s.tasks, s.outputs, s.channels / groups, kernel_h, kernel_w});
  const int64_t pieces = conv_pieces(s);
  Tensor sums = new_sums(grad, pieces > 1 ? pieces * out.numel() : 0);
  p.sums = sums.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  launch_task_conv2d_bwd_weight(dtype_of(kOp, grad), p, device.stream);
  device.check(kOp);
  return out;
}

}  // namespace

FM_LIBRARY {
  m.impl("task_conv2d", TORCH_BOX(&task_conv2d));
  m.impl("task_conv2d_bwd_data", TORCH_BOX(&task_conv2d_bwd_data));
  m.impl("task_conv2d_bwd_weight", TORCH_BOX(&task_conv2d_bwd_weight));
}

}  // namespace fastmeta::cuda
