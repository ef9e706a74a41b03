// The gradient of a convolution for its weights: a matrix product over pixels, split into pieces that are added up in
// order.
#pragma once

#include "../column_sums.h"
#include "cursor.h"
#include "tile.h"

namespace fastmeta::cuda {

struct ConvPlace {
  int64_t image;  // where the input's image begins, -1 behind the last
  int h, w;
};

// Rows of a tile are outputs, columns are taps and their channels, terms are pixels of y.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    conv_weight_gradient_kernel(TaskConv2dBwdWeight p, int64_t pieces, int64_t length) {
  using A = Acc<T>;
  __shared__ Panel<A> a, b;
  __shared__ ConvPlace places[kDepth];
  const ConvShape& s = p.shape;
  const int id = int(threadIdx.x), lane = id % kTile;
  const int inputs = int(s.channels / s.groups), outputs = int(s.outputs / s.groups);
  const int taps = int(s.kernel_h * s.kernel_w), columns = taps * inputs;
  const int high = int(s.height), wide = int(s.width), stride = int(s.channels);
  const int64_t pixels = s.rows * s.out_height * s.out_width;
  FM_EACH(part, x, divide_up<int64_t>(columns, kTile) * pieces) FM_EACH(row_tile, y, divide_up<int64_t>(outputs, kTile))
  FM_EACH(unit, z, s.tasks * s.groups) {
    const int64_t task = unit / s.groups, group = unit % s.groups, piece = part % pieces;
    const int first_row = int(row_tile) * kTile, first_column = int(part / pieces) * kTile;
    const int64_t first = piece * length, end = smaller(pixels, first + length);
    const int tap = (first_column + lane) / inputs, channel = (first_column + lane) % inputs;
    const int tap_h = int(tap / s.kernel_w * s.dilation_h - s.pad_h);
    const int tap_w = int(tap % s.kernel_w * s.dilation_w - s.pad_w);
    const T* grad = static_cast<const T*>(p.grad.data) + task * p.grad.task + group * outputs + first_row + lane;
    const T* x = static_cast<const T*>(p.x.data) + task * p.x.task + group * inputs + channel;
    Cursor at(first + id % kDepth, s.out_height, s.out_width);
    Products<A> products;
    products.clear();
    for (int64_t pixel = first; pixel < end; pixel += kDepth) {
      __syncthreads();
      if (id < kDepth) {
        places[id] = {pixel + id < end ? at.image * s.height * s.width * s.channels : -1, int(at.i * s.stride_h),
                      int(at.j * s.stride_w)};
        at.advance(kDepth);
      }
      __syncthreads();
#pragma unroll
      for (int k = id / kTile; k < kDepth; k += kTileThreads / kTile) {
        const ConvPlace& place = places[k];
        const int h = place.h + tap_h, w = place.w + tap_w;
        const bool seen = place.image >= 0 && first_column + lane < columns && h >= 0 && h < high && w >= 0 && w < wide;
        a.at(k, lane) = place.image >= 0 && first_row + lane < outputs ? load(grad + (pixel + k) * s.outputs) : A(0);
        b.at(k, lane) = seen ? load(x + place.image + int64_t(h * wide + w) * stride) : A(0);
      }
      __syncthreads();
      products.add(a, b);
    }
    const int64_t size = s.outputs * columns;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int row = first_row + products.row() + i, column = first_column + products.column() + j;
        if (row >= outputs || column >= columns) continue;
        const int64_t at = (group * outputs + row) * columns + column % inputs * taps + column / inputs;
        if (pieces > 1)
          static_cast<A*>(p.sums)[(task * pieces + piece) * size + at] = products.sum[i][j];
        else
          store(static_cast<T*>(p.out) + task * size + at, products.sum[i][j]);
      }
    }
  }
}

template <class T>
void launch_conv_weight_gradient(const TaskConv2dBwdWeight& p, void* stream) {
  const ConvShape& s = p.shape;
  const int64_t columns = s.channels / s.groups * s.kernel_h * s.kernel_w, pieces = conv_pieces(s);
  const Grid grid{divide_up<int64_t>(columns, kTile) * pieces, divide_up<int64_t>(s.outputs / s.groups, kTile),
                  s.tasks * s.groups};
  launch(conv_weight_gradient_kernel<T>, grid, kTileThreads, 0, stream, p, pieces,
         divide_up(s.rows * s.out_height * s.out_width, pieces));
  if (pieces > 1) launch_add_groups<T>(p.sums, s.tasks, pieces, s.outputs * columns, p.out, stream);
}

}  // namespace fastmeta::cuda
