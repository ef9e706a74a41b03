// A whole MLP forward for a pack of tasks, as many as a vector has lanes: small nets whose rows would fill vectors badly.
#pragma once

#include "activation_kernel.h"
#include "carver.h"
#include "kernels.h"
#include "lanes.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int64_t kPackBytes = 320 << 10;  // of weights, up to here
constexpr int64_t kPackRows = 20;          // at once

// How many tasks a pack takes, 0 where one at a time is faster: where their rows fill vectors, weights outgrow the
// cache, or rows of an input are 4096 bytes apart, which all fall into one set of the first-level cache.
template <class T>
int64_t mlp_lanes(const int64_t* widths, int64_t layers, int64_t rows) {
  constexpr int64_t W = kWidth<T>, number = W * int64_t(sizeof(T));
  int64_t size = 0;
  for (int64_t l = 0; l < layers; ++l) {
    if (widths[l] == 0 || widths[l + 1] == 0 || widths[l] * number % 4096 == 0) return 0;
    size += widths[l] * widths[l + 1];
  }
  return rows > 0 && 5 * rows <= 4 * padded<T>(rows) && size * number <= kPackBytes ? W : 0;
}

template <class T>
void mlp_pack(const cpu::MlpPack<T>& p) {
  constexpr int64_t W = kWidth<T>;
  const int64_t most = divide_up(p.rows, divide_up(p.rows, kPackRows));
  int64_t size = 0, widest = 0;
  for (int64_t l = 0; l < p.layers; ++l) {
    size += (p.weights[l].step ? p.widths[l] * p.widths[l + 1] : 0) + p.widths[l + 1];
    widest = larger(widest, larger(p.widths[l], p.widths[l + 1]));
  }
  T *block, *values[2];
  const auto carve = [&](Carver c) {
    block = c.take<T>(size * W);
    for (T*& buffer : values) buffer = c.take<T>(most * widest * W);
    return c.used;
  };
  carve({static_cast<char*>(cpu::thread_scratch(carve({nullptr})))});
  const auto lanes_of = [&](const cpu::Operand<T>& o, int64_t n) -> LaneNumbers<T> {
    if (!o.base) return {};
    if (o.step == 0) return {o.base, true};
    T* to = block;
    block += n * W;
    to_lanes<T>(p.count, n, o.base, o.step, to);
    return {to};
  };
  LaneNumbers<T> weight[cpu::kMaxLayers], bias[cpu::kMaxLayers];
  for (int64_t l = 0; l < p.layers; ++l) {
    weight[l] = lanes_of(p.weights[l], p.widths[l] * p.widths[l + 1]);
    bias[l] = lanes_of(p.biases[l], p.widths[l + 1]);
  }
  const int64_t inputs = p.widths[0], outputs = p.widths[p.layers];
  for (int64_t begin = 0; begin < p.rows; begin += most) {
    const int64_t rows = smaller(most, p.rows - begin);
    T *now = values[0], *next = values[1];
    to_lanes<T>(p.count, rows * inputs, p.x.base + begin * inputs, p.x.step, now);
    for (int64_t l = 0; l < p.layers; ++l) {
      const int64_t in = p.widths[l], out = p.widths[l + 1];
      const bool hidden = l + 1 < p.layers, relu = hidden && p.activation == cpu::kRelu;
      LaneProduct<T> product{now, in, 1, weight[l], 1, in, in, next, out, 1, bias[l]};
      product.relu = relu;
      multiply_lanes(rows, out, product);
      if (hidden && !relu) activate<T>(p.activation, next, next, rows * out * W);
      T* swap = now;
      now = next;
      next = swap;
    }
    transpose<T>(rows * outputs, p.count, now, W, p.out + begin * outputs, p.out_step, rows * outputs);
  }
}

}  // namespace fastmeta::FASTMETA_ISA
