// What a convolution reads and writes, in plain numbers: the same description serves the convolution and its gradient
// for the images.
//
// Output pixels come in phases. Those of one phase stand at (first + i * out_step) and all read the same taps: at tap
// (h, w) the source pixel (i * source_step + h, ...). The convolution has one phase, of all pixels. Its gradient for
// the images has one for each remainder of a pixel's place by the stride; each tap of the kernel belongs to one of
// them, and no product with a zero between strides is ever formed.
#pragma once

#include <stdint.h>

// not left to the linker: kernels of several instruction sets compile these
#define FM_CONV_INLINE __attribute__((always_inline))

namespace fastmeta::cpu {

struct ConvTap {
  int32_t h, w;
  int32_t index;  // of the kernel, kh * width + kw
};

struct ConvPhase {
  int64_t first_h, first_w;
  int64_t taps, tap_count;  // from `ConvGeometry::taps` on
};

struct ConvGeometry {
  int64_t source_h, source_w, source_c;
  int64_t out_h, out_w, out_c;
  int64_t groups, kernel;  // kernel: its number of taps
  int64_t source_step_h, source_step_w, out_step_h, out_step_w;
  int64_t low_h, low_w, high_h, high_w;  // of all taps
  const ConvTap* taps;
  const ConvPhase* phases;
  int64_t phase_count;
  bool transposed;  // weights are [source channels, out channels of a group, taps], not [out, source of a group, taps]

  // rows and columns of the largest phase
  FM_CONV_INLINE int64_t rows() const { return (out_h + out_step_h - 1) / out_step_h; }
  FM_CONV_INLINE int64_t columns() const { return (out_w + out_step_w - 1) / out_step_w; }
  FM_CONV_INLINE int64_t source_channels() const { return source_c / groups; }  // of a group
  FM_CONV_INLINE int64_t out_channels() const { return out_c / groups; }
  // of the source, what `count` rows or all columns of a phase read
  FM_CONV_INLINE int64_t source_rows(int64_t count) const { return (count - 1) * source_step_h + high_h - low_h + 1; }
  FM_CONV_INLINE int64_t source_columns() const { return (columns() - 1) * source_step_w + high_w - low_w + 1; }
  // Whether tiles of 2 x 2 outputs serve (tiles.h), in `number_size` bytes a number; never by how many images there
  // are: the same image has the same bits in any company. Float64 is there for the last digits. The sums that make
  // and read tiles cost a third of what the products do with few channels.
  FM_CONV_INLINE bool tiled(int64_t number_size) const {
    const bool plain = groups == 1 && phase_count == 1 && source_step_h == 1 && source_step_w == 1 && out_step_h == 1 &&
                       out_step_w == 1;
    const bool nine = kernel == 9 && high_h - low_h == 2 && high_w - low_w == 2;
    const int64_t products = 16 * ((out_h + 1) / 2) * ((out_w + 1) / 2);
    return number_size == 4 && plain && nine && source_c >= 16 && out_c >= 16 && 7 * products <= 5 * 9 * out_h * out_w;
  }
  // What a task's images are split into: rows, or lines of tiles.
  FM_CONV_INLINE int64_t lines(int64_t number_size) const { return tiled(number_size) ? (out_h + 1) / 2 : rows(); }
  FM_CONV_INLINE bool reads_beyond_borders() const {
    return low_h < 0 || low_w < 0 || low_h + source_rows(rows()) > source_h || low_w + source_columns() > source_w;
  }
};

// Lines [begin, end) of the images of one task, counted on from image to image as `ConvGeometry::lines` has them.
template <class T>
struct ConvItem {
  const ConvGeometry* geometry;
  const T* source;
  const T* weight;
  const T* bias;  // null: none
  T* out;
  int64_t begin, end;
};

// The gradient of the weight, of these lines.
template <class T>
struct ConvWeightItem {
  const ConvGeometry* geometry;  // of the convolution
  const T* source;
  const T* grad;
  T* d_weight;
  int64_t begin, end;
};

}  // namespace fastmeta::cpu
