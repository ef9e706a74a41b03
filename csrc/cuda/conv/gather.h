// The convolution and its gradient for the images, as one implicit matrix product: each pixel gathers what its taps
// see, times packed weights.
#pragma once

#include "cursor.h"
#include "tile.h"

namespace fastmeta::cuda {

// Tap k of output pixel o sees input pixel (o * scale + offset + k * per_tap) / divisor, where that is whole. Output
// pixels of one remainder by `divisor` see the same taps, so that a tile of such pixels needs no others.
struct ConvAxis {
  int in, out, taps, scale, offset, per_tap, divisor;

  __device__ __forceinline__ int numerator(int remainder, int tap) const {
    return remainder * scale + offset + tap * per_tap;
  }
  __device__ __forceinline__ bool sees(int remainder, int tap) const {
    return numerator(remainder, tap) % divisor == 0;
  }
};

struct ConvGather {
  const void* in;      // [tasks, rows, h.in, w.in, groups * terms]
  const void* weight;  // packed [tasks, groups, taps, terms, columns]
  const void* bias;    // [tasks, groups * columns], or nullptr
  void* out;           // [tasks, rows, h.out, w.out, groups * columns]
  ConvAxis h, w;
  int64_t tasks, rows, groups, in_task, weight_task, bias_task;
  int terms, columns;  // channels of a group that are read and written
};

// The terms of a pixel's sum: the channels of one tap after the other.
struct ConvTerms {
  int remainder_h, remainder_w, tap_h = 0, tap_w = -1, channel = 0;

  __device__ __forceinline__ void next_tap(const ConvGather& p) {
    do {
      if (++tap_w < p.w.taps) continue;
      tap_w = 0;
      ++tap_h;
    } while (tap_h < p.h.taps && !(p.h.sees(remainder_h, tap_h) && p.w.sees(remainder_w, tap_w)));
  }
  __device__ __forceinline__ void advance(const ConvGather& p, int count) {
    channel += count;
    while (channel >= p.terms && tap_h < p.h.taps) {
      channel -= p.terms;
      next_tap(p);
    }
  }
};

struct ConvTerm {
  int weight, channel, h, w;  // row of the weight, -1 behind the last; what is added to the pixel's place
};
struct ConvPixel {
  int64_t image, target;  // where the input's image begins; the output's pixel, -1 where there is none
  int h, w;
};

__device__ __forceinline__ ConvTerm term_of(const ConvGather& p, const ConvTerms& t) {
  if (t.tap_h >= p.h.taps) return {-1, 0, 0, 0};
  return {(t.tap_h * p.w.taps + t.tap_w) * p.terms + t.channel, t.channel,
          p.h.numerator(t.remainder_h, t.tap_h) / p.h.divisor, p.w.numerator(t.remainder_w, t.tap_w) / p.w.divisor};
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2) conv_gather_kernel(ConvGather p) {
  using A = Acc<T>;
  __shared__ Panel<A> a, b;
  __shared__ ConvPixel pixels[kTile];
  __shared__ ConvTerm terms[kDepth];
  const int id = int(threadIdx.x);
  const int high = divide_up(p.h.out, p.h.divisor), wide = divide_up(p.w.out, p.w.divisor);
  const int stride = int(p.groups) * p.terms;  // from pixel to pixel
  const int64_t count = p.rows * high * wide, tiles = divide_up<int64_t>(count, kTile);
  FM_EACH(pixel_tile, x, tiles * p.h.divisor * p.w.divisor)
  FM_EACH(column_tile, y, divide_up<int64_t>(p.columns, kTile)) FM_EACH(unit, z, p.tasks * p.groups) {
    const int64_t task = unit / p.groups, group = unit % p.groups, kind = pixel_tile / tiles;
    const int remainder_h = int(kind / p.w.divisor), remainder_w = int(kind % p.w.divisor);
    const int first_column = int(column_tile) * kTile, columns = p.columns - first_column;
    ConvTerms walk{remainder_h, remainder_w};
    __syncthreads();
    if (id < kDepth) {
      walk.next_tap(p);
      walk.advance(p, id);
      terms[id] = term_of(p, walk);
    }
    if (id < kTile) {
      const int64_t index = (pixel_tile - kind * tiles) * kTile + id;
      const Cursor at(index, high, wide);
      const int h = at.i * p.h.divisor + remainder_h, w = at.j * p.w.divisor + remainder_w;
      const bool inside = index < count && h < p.h.out && w < p.w.out;
      pixels[id] = {at.image * p.h.in * p.w.in * stride, inside ? (at.image * p.h.out + h) * p.w.out + w : -1,
                    at.i * p.h.scale, at.j * p.w.scale};
    }
    const T* in = static_cast<const T*>(p.in) + task * p.in_task + group * p.terms;
    const T* weight = static_cast<const T*>(p.weight) + task * p.weight_task + first_column +
                      group * p.h.taps * p.w.taps * p.terms * p.columns;
    Products<A> products;
    products.clear();
    for (;;) {
      __syncthreads();
      if (terms[0].weight < 0) break;
#pragma unroll
      for (int i = id; i < kTile * kDepth; i += kTileThreads) {  // neighbouring threads read neighbouring channels
        const ConvPixel& pixel = pixels[i / kDepth];
        const ConvTerm& term = terms[i % kDepth];
        const int h = pixel.h + term.h, w = pixel.w + term.w;
        const bool inside = pixel.target >= 0 && term.weight >= 0 && h >= 0 && h < p.h.in && w >= 0 && w < p.w.in;
        a.at(i % kDepth, i / kDepth) =
            inside ? load(in + pixel.image + int64_t(h * p.w.in + w) * stride + term.channel) : A(0);
      }
#pragma unroll
      for (int i = id; i < kTile * kDepth; i += kTileThreads) {
        const int row = terms[i / kTile].weight;
        const bool inside = row >= 0 && i % kTile < columns;
        b.at(i / kTile, i % kTile) = inside ? load(weight + int64_t(row) * p.columns + i % kTile) : A(0);
      }
      __syncthreads();
      if (id < kDepth) {
        walk.advance(p, kDepth);
        terms[id] = term_of(p, walk);
      }
      products.add(a, b);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t target = pixels[products.row() + i].target;
      if (target < 0) continue;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (products.column() + j >= columns) continue;
        const int64_t channel = group * p.columns + first_column + products.column() + j;
        A v = products.sum[i][j];
        if (p.bias) v += load(static_cast<const T*>(p.bias) + task * p.bias_task + channel);
        store(static_cast<T*>(p.out) +
                  (task * p.rows * p.h.out * p.w.out + target) * p.groups * p.columns + channel, v);
      }
    }
  }
}

template <class T>
void launch_conv_gather(const ConvGather& p, void* stream) {
  const int64_t pixels = p.rows * divide_up<int64_t>(p.h.out, p.h.divisor) * divide_up<int64_t>(p.w.out, p.w.divisor);
  const Grid grid{divide_up<int64_t>(pixels, kTile) * p.h.divisor * p.w.divisor, divide_up<int64_t>(p.columns, kTile),
                  p.tasks * p.groups};
  launch(conv_gather_kernel<T>, grid, kTileThreads, 0, stream, p);
}

}  // namespace fastmeta::cuda
