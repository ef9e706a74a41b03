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
  FM_CONV_INLINE bool reads_beyond_borders() const {
    return low_h < 0 || low_w < 0 || low_h + source_rows(rows()) > source_h || low_w + source_columns() > source_w;
  }
};

// Rows [begin, end) of the images of one task, rows counted on from image to image as `ConvGeometry::rows` has them.
template <class T>
struct ConvItem {
  const ConvGeometry* geometry;
  const T* source;
  const T* weight;
  const T* bias;  // null: none
  T* out;
  int64_t begin, end;
};

// The gradient of the weight, of these rows.
template <class T>
struct ConvWeightItem {
  const ConvGeometry* geometry;  // of the convolution
  const T* source;
  const T* grad;
  T* d_weight;
  int64_t begin, end;
};

}  // namespace fastmeta::cpu
