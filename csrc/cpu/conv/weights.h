// The weights of a convolution in panels, row by row as its steps go, and the gradient of the weights back from there.
#pragma once

#include <fastmeta/gemm.h>

#include "geometry.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
constexpr int kPackBlock = kBlock<T> < kWidth<T> ? kBlock<T> : kWidth<T>;

// to(j)[i] = from[i, j] for `rows` of one block, zero from there to its end.
template <class T, class To>
FM_INLINE void scatter_columns(int64_t rows, int64_t columns, const T* from, int64_t ld, const To& to) {
  constexpr int B = kPackBlock<T>;
  int64_t j = 0;
  if constexpr (B == kBlock<T>) {
    for (; rows == B && j + B <= columns; j += B) {
      alignas(64) T block[B * B];
      transpose_block<T>(from + j, ld, block, B);
      FM_UNROLL for (int c = 0; c < B; ++c) memcpy(to(j + c), block + c * B, B * sizeof(T));
    }
  }
  for (; j < columns; ++j) {
    T* out = to(j);
    for (int64_t i = 0; i < rows; ++i) out[i] = from[i * ld + j];
    for (int64_t i = rows; i < B; ++i) out[i] = 0;
  }
}

// to[i, j] = from(j)[i]
template <class T, class From>
FM_INLINE void gather_columns(int64_t rows, int64_t columns, const From& from, T* to, int64_t ld) {
  constexpr int B = kPackBlock<T>;
  int64_t j = 0;
  if constexpr (B == kBlock<T>) {
    for (; rows == B && j + B <= columns; j += B) {
      alignas(64) T block[B * B];
      FM_UNROLL for (int c = 0; c < B; ++c) memcpy(block + c * B, from(j + c), B * sizeof(T));
      transpose_block<T>(block, B, to + j, ld);
    }
  }
  for (; j < columns; ++j) {
    const T* in = from(j);
    for (int64_t i = 0; i < rows; ++i) to[i * ld + j] = in[i];
  }
}

// Row of a phase's panels by channel and tap of the weight, c * kernel + tap: taps in order, each with its channels.
FM_INLINE void weight_rows(const cpu::ConvGeometry& g, int32_t* row) {
  const int64_t channels = g.source_channels();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < g.kernel; ++tap) *row++ = int32_t(tap * channels + c);
}

// Numbers of a group's panels.
template <class T>
int64_t packed_size(const cpu::ConvGeometry& g) {
  return padded<T>(g.out_channels()) * g.source_channels() * g.kernel;
}

// Panels of one group, weights [out, source of the group, taps].
template <class T>
void pack_weights(const cpu::ConvGeometry& g, int64_t group, const T* weight, const int32_t* row, T* to) {
  constexpr int W = kWidth<T>, B = kPackBlock<T>;
  const int64_t columns = g.out_channels(), depth = g.source_channels() * g.kernel, vectors = divide_up(columns, W);
  weight += group * columns * depth;
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = panel_vectors(vectors - v);
    T* panel = to + v * W * depth;
    for (int64_t j = 0; j < width * W; j += B) {
      const int64_t o = v * W + j;
      scatter_columns(larger(0, smaller(B, columns - o)), depth, weight + o * depth, depth,
                      [=](int64_t k) { return panel + row[k] * width * W + j; });
    }
  }
}

// Panels of one group, phase by phase, weights [source, out of the group, taps]. `tap_row`: room for the kernel.
template <class T>
void pack_weights_transposed(const cpu::ConvGeometry& g, int64_t group, const T* weight, T** tap_row, T* to) {
  constexpr int W = kWidth<T>, B = kPackBlock<T>;
  const int64_t columns = g.out_channels(), channels = g.source_channels(), vectors = divide_up(columns, W);
  weight += group * channels * columns * g.kernel;
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = panel_vectors(vectors - v);
    T* phase_start = to;
    for (int64_t p = 0; p < g.phase_count; ++p) {
      const cpu::ConvPhase& phase = g.phases[p];
      T* panel = phase_start + v * W * phase.tap_count * channels;
      for (int64_t t = 0; t < phase.tap_count; ++t)
        tap_row[g.taps[phase.taps + t].index] = panel + t * channels * width * W;
      phase_start += padded<T>(columns) * phase.tap_count * channels;
    }
    for (int64_t j = 0; j < width * W; j += B) {
      const int64_t c = v * W + j, rows = larger(0, smaller(B, columns - c));
      for (int64_t o = 0; o < channels; ++o)
        scatter_columns(rows, g.kernel, weight + (o * columns + c) * g.kernel, g.kernel,
                        [=](int64_t tap) { return tap_row[tap] + o * width * W + j; });
    }
  }
}

// The gradient of one group's weights [out, source of the group, taps] from `sums` [steps, padded out channels].
template <class T>
void unpack_weights(const cpu::ConvGeometry& g, int64_t group, const T* sums, const int32_t* row, T* weight) {
  constexpr int B = kPackBlock<T>;
  const int64_t columns = g.out_channels(), depth = g.source_channels() * g.kernel, ld = padded<T>(columns);
  weight += group * columns * depth;
  for (int64_t o = 0; o < columns; o += B)
    gather_columns(smaller(B, columns - o), depth, [=](int64_t k) { return sums + row[k] * ld + o; },
                   weight + o * depth, depth);
}

}  // namespace fastmeta::FASTMETA_ISA
