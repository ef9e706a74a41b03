// task_conv2d and its two gradients on CPU tensors. Tasks that share weights and bias are one task with the images of
// all; otherwise split over tasks, and over ranges of lines of images where tasks are few.
#include "tensors.h"

#include <algorithm>

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "task_conv2d";
constexpr int64_t kItems = 32;  // fewer tasks are split

// A description with the memory that it points to.
struct Geometry {
  ConvGeometry plain{};
  std::vector<ConvTap> taps;
  std::vector<ConvPhase> phases;
  Geometry() = default;
  Geometry(const Geometry&) = delete;
};

struct Options {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  void check() const {
    STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0 && groups > 0 && pad_h >= 0 &&
                        pad_w >= 0 && kernel_h > 0 && kernel_w > 0,
                    kOp, ": strides, dilations, groups and kernel sizes are positive, padding is not negative");
  }
  int64_t out_h(int64_t height) const { return size(height, kernel_h, stride_h, pad_h, dilation_h); }
  int64_t out_w(int64_t width) const { return size(width, kernel_w, stride_w, pad_w, dilation_w); }
  static int64_t size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
    STD_TORCH_CHECK(room >= 0, kOp, ": images of ", size, " with ", pad, " pixels of padding are smaller than the kernel");
    return room / stride + 1;
  }

  // images [height, width, in], output [.., .., out]
  void describe(int64_t height, int64_t width, int64_t in, int64_t out, Geometry& found) const {
    ConvGeometry& g = start(found, in, out, false);
    g.source_h = height, g.source_w = width;
    g.out_h = out_h(height), g.out_w = out_w(width);
    g.source_step_h = stride_h, g.source_step_w = stride_w;
    g.out_step_h = g.out_step_w = 1;
    for (int64_t h = 0; h < kernel_h; ++h)
      for (int64_t w = 0; w < kernel_w; ++w)
        found.taps.push_back({int32_t(h * dilation_h - pad_h), int32_t(w * dilation_w - pad_w),
                              int32_t(h * kernel_w + w)});
    found.phases.push_back({0, 0, 0, g.kernel});
    finish(found);
  }

  // from gradients of [.., .., out] to those of images [height, width, in]
  void describe_gradient(int64_t height, int64_t width, int64_t in, int64_t out, Geometry& found) const {
    ConvGeometry& g = start(found, out, in, true);
    g.source_h = out_h(height), g.source_w = out_w(width);
    g.out_h = height, g.out_w = width;
    g.source_step_h = g.source_step_w = 1;
    g.out_step_h = stride_h, g.out_step_w = stride_w;
    for (int64_t first_h = 0; first_h < std::min(stride_h, height); ++first_h)
      for (int64_t first_w = 0; first_w < std::min(stride_w, width); ++first_w) {
        const int64_t before = int64_t(found.taps.size());
        for (int64_t h = 0; h < kernel_h; ++h)
          for (int64_t w = 0; w < kernel_w; ++w) {
            // the output pixels that this tap of the kernel brought these pixels to
            const int64_t to_h = first_h + pad_h - h * dilation_h, to_w = first_w + pad_w - w * dilation_w;
            if (to_h % stride_h == 0 && to_w % stride_w == 0)
              found.taps.push_back({int32_t(to_h / stride_h), int32_t(to_w / stride_w), int32_t(h * kernel_w + w)});
          }
        found.phases.push_back({first_h, first_w, before, int64_t(found.taps.size()) - before});
      }
    finish(found);
  }

 private:
  ConvGeometry& start(Geometry& found, int64_t source_c, int64_t out_c, bool transposed) const {
    ConvGeometry& g = found.plain;
    g.source_c = source_c, g.out_c = out_c;
    g.groups = groups, g.kernel = kernel_h * kernel_w;
    g.transposed = transposed;
    return g;
  }
  static void finish(Geometry& found) {
    ConvGeometry& g = found.plain;
    g.taps = found.taps.data();
    g.phases = found.phases.data();
    g.phase_count = int64_t(found.phases.size());
    if (!found.taps.empty()) g.low_h = g.high_h = found.taps[0].h, g.low_w = g.high_w = found.taps[0].w;
    for (const ConvTap& tap : found.taps) {
      g.low_h = std::min<int64_t>(g.low_h, tap.h), g.high_h = std::max<int64_t>(g.high_h, tap.h);
      g.low_w = std::min<int64_t>(g.low_w, tap.w), g.high_w = std::max<int64_t>(g.high_w, tap.w);
    }
    // offsets within a block are of 32 bits
    const int64_t line = std::max((g.source_w + g.source_columns()) * g.source_c, g.out_w * g.out_c);
    STD_TORCH_CHECK(line * std::max(g.source_h + g.source_rows(g.rows()), g.out_h) < (int64_t(1) << 31), kOp,
                    ": images of ", g.source_h, " x ", g.source_w, " are too large");
  }
};

// How the work is split, never by the number of threads: a gradient that is a sum over parts has the same bits on any.
struct Split {
  int64_t tasks, lines, parts, cost;  // lines: of the images of one task

  Split(const ConvGeometry& g, size_t number_size, int64_t tasks, int64_t images)
      : tasks(tasks), lines(images * g.lines(int64_t(number_size))) {
    // so much work that what is done once for a part, such as packing the weights, does not count
    constexpr int64_t kLeastPixels = 512, kLeastProducts = 2000000;
    const int64_t pixels = images * g.rows() * g.columns(), row = g.out_c * g.kernel * g.source_channels();
    const int64_t most = std::min({pixels / kLeastPixels, pixels * row / kLeastProducts, lines});
    parts = std::max<int64_t>(1, std::min(most, (kItems + tasks - 1) / std::max<int64_t>(1, tasks)));
    cost = pixels * row / parts;
  }
  int64_t items() const { return tasks * parts; }
};

int64_t leading(int64_t tasks, const Tensor& t) {
  const int64_t size = t.size(0);
  STD_TORCH_CHECK(size == 1 || tasks == 1 || size == tasks, kOp, ": tensors of ", tasks, " and of ", size, " tasks");
  return size == 1 ? tasks : size;
}

template <class T>
const T* of_task(const Tensor& t, int64_t task) {
  return data<T>(t) + (t.size(0) == 1 ? 0 : task * (t.numel() / t.size(0)));
}

Tensor convolve(const Geometry& geometry, int64_t images, const Tensor& source, const Tensor& weight,
                const std::vector<Tensor>& bias) {
  const ConvGeometry& g = geometry.plain;
  int64_t tasks = leading(leading(1, source), weight);
  if (!bias.empty()) tasks = leading(tasks, bias[0]);
  Tensor out = new_tensor(source, {tasks, images, g.out_h, g.out_w, g.out_c});
  if (out.numel() == 0) return out;
  if (weight.size(0) == 1 && source.size(0) == tasks && (bias.empty() || bias[0].size(0) == 1)) {
    images *= tasks;
    tasks = 1;
  }
  by_dtype(kOp, source, [&](auto zero) {
    using T = decltype(zero);
    const Split split(g, sizeof(T), tasks, images);
    T* to = mutable_data<T>(out);
    const int64_t size = out.numel() / tasks;
    parallel(split.items(), split.cost, [&](int64_t i) {
      const int64_t task = i / split.parts;
      const Range range = part(split.lines, split.parts, i % split.parts);
      kernels<T>().conv({&g, of_task<T>(source, tasks == 1 ? 0 : task), of_task<T>(weight, task),
                         bias.empty() ? nullptr : of_task<T>(bias[0], task), to + task * size, range.begin, range.end});
    });
  });
  return out;
}

Tensor task_conv2d(Tensor x, Tensor weight, std::vector<Tensor> bias, int64_t stride_h, int64_t stride_w,
                   int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  check_dims(kOp, x, 5);
  check_dims(kOp, weight, 5);
  const Options options{weight.size(3), weight.size(4), stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups};
  options.check();
  STD_TORCH_CHECK(x.size(4) == weight.size(2) * groups && weight.size(1) % groups == 0, kOp, ": weights of ",
                  weight.size(1), " x ", weight.size(2), " channels and ", groups, " groups, images of ", x.size(4));
  STD_TORCH_CHECK(bias.size() <= 1, kOp, ": one bias, or none");
  for (const Tensor& b : bias) {
    check_dims(kOp, b, 2);
    STD_TORCH_CHECK(b.size(1) == weight.size(1), kOp, ": a bias of ", b.size(1), " for ", weight.size(1), " channels");
  }
  Geometry geometry;
  options.describe(x.size(2), x.size(3), x.size(4), weight.size(1), geometry);
  return convolve(geometry, x.size(1), x, weight, bias);
}

Tensor task_conv2d_bwd_data(Tensor grad, Tensor weight, int64_t height, int64_t width, int64_t stride_h,
                            int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                            int64_t groups) {
  check_dims(kOp, grad, 5);
  check_dims(kOp, weight, 5);
  const Options options{weight.size(3), weight.size(4), stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups};
  options.check();
  STD_TORCH_CHECK(grad.size(4) == weight.size(1) && weight.size(1) % groups == 0 &&
                      grad.size(2) == options.out_h(height) && grad.size(3) == options.out_w(width),
                  kOp, ": a gradient of ", grad.size(2), " x ", grad.size(3), " x ", grad.size(4),
                  " is not that of images of ", height, " x ", width, " and ", weight.size(1), " filters");
  Geometry geometry;
  options.describe_gradient(height, width, weight.size(2) * groups, weight.size(1), geometry);
  return convolve(geometry, grad.size(1), grad, weight, {});
}

Tensor task_conv2d_bwd_weight(Tensor grad, Tensor x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                              int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                              int64_t groups) {
  check_dims(kOp, grad, 5);
  check_dims(kOp, x, 5);
  const Options options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups};
  options.check();
  STD_TORCH_CHECK(grad.size(1) == x.size(1) && grad.size(4) % groups == 0 && x.size(4) % groups == 0 &&
                      grad.size(2) == options.out_h(x.size(2)) && grad.size(3) == options.out_w(x.size(3)),
                  kOp, ": a gradient of ", grad.size(2), " x ", grad.size(3), " x ", grad.size(4),
                  " is not that of images of ", x.size(2), " x ", x.size(3), " x ", x.size(4));
  const int64_t tasks = leading(leading(1, grad), x);
  Tensor out = new_tensor(x, {tasks, grad.size(4), x.size(4) / groups, kernel_h, kernel_w});
  if (out.numel() == 0) return out;
  Geometry geometry;
  options.describe(x.size(2), x.size(3), x.size(4), grad.size(4), geometry);
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Split split(geometry.plain, sizeof(T), tasks, x.size(1));
    const int64_t size = out.numel() / tasks;
    const Tensor partials = split.parts > 1 ? new_tensor(x, {split.items(), size}) : out;
    T* to = mutable_data<T>(partials);
    parallel(split.items(), split.cost, [&](int64_t i) {
      const int64_t task = i / split.parts;
      const Range range = part(split.lines, split.parts, i % split.parts);
      kernels<T>().conv_weight({&geometry.plain, of_task<T>(x, task), of_task<T>(grad, task), to + i * size,
                                range.begin, range.end});
    });
    if (split.parts == 1) return;
    constexpr int64_t kColumns = 1024;
    const int64_t blocks = (size + kColumns - 1) / kColumns;
    T* sums = mutable_data<T>(out);
    parallel(tasks * blocks, split.parts * kColumns, [&](int64_t i) {
      const int64_t task = i / blocks, start = i % blocks * kColumns;
      kernels<T>().sum_partials(to + task * split.parts * size + start, split.parts, size, sums + task * size + start,
                                std::min(kColumns, size - start));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("task_conv2d", TORCH_BOX(&task_conv2d));
  m.impl("task_conv2d_bwd_data", TORCH_BOX(&task_conv2d_bwd_data));
  m.impl("task_conv2d_bwd_weight", TORCH_BOX(&task_conv2d_bwd_weight));
}

}  // namespace fastmeta::cpu
