// Images taken a block at a time: some whole ones where they are small, a strip of rows of one where they are large.
// Where taps reach beyond the borders, a block is a copy within zeros, so that no tap asks where it is.
#pragma once

#include "../carver.h"
#include "geometry.h"

namespace fastmeta::FASTMETA_ISA {

// Of a block, about. Few pixels would wait for the weights, of which each block reads all; a source of many channels is
// read a part of the depth at a time, so that it need not fit a cache that is near.
constexpr int64_t kConvPixels = 320;
constexpr int64_t kConvBytes = 1 << 20;

template <class T>
struct Strips {
  const cpu::ConvGeometry& g;
  const bool copied;
  int64_t width;                   // of a source row as the taps read it
  int64_t most_images, most_rows;  // of a block: images if whole ones, rows if not
  T* copy;
  int32_t *row, *out_row;  // where pixels of the block read and are written

  // the block
  int64_t image, images, first, rows;
  const T* source;  // where row 0 and tap (low_h, low_w) read

  explicit Strips(const cpu::ConvGeometry& g) : g(g), copied(g.reads_beyond_borders()) {
    width = copied ? g.source_columns() : g.source_w;
    const int64_t line = width * g.source_c * int64_t(sizeof(T));
    const int64_t pixels = g.rows() * g.columns(), bytes = g.source_rows(g.rows()) * line;
    most_images = smaller(kConvPixels / larger(1, pixels), kConvBytes / larger(1, bytes));
    if (most_images > 0) {
      most_rows = g.rows();
    } else {
      const int64_t fitting = (kConvBytes / line - (g.high_h - g.low_h)) / g.source_step_h;
      most_rows = larger(1, smaller(fitting, kConvPixels / g.columns()));
      most_rows = divide_up(g.rows(), divide_up(g.rows(), most_rows));
      most_images = 1;
    }
  }

  int64_t most_pixels() const { return most_images * most_rows * g.columns(); }

  void carve(Carver& c) {
    copy = c.take<T>(copied ? most_images * g.source_rows(most_rows) * width * g.source_c : 0);
    row = c.take<int32_t>(most_pixels());
    out_row = c.take<int32_t>(most_pixels());
  }

  // The block from row `begin` on, counted through all images; returns where it ends.
  int64_t take(const T* images_start, int64_t begin, int64_t end) {
    const int64_t height = g.rows();
    image = begin / height;
    first = begin % height;
    if (first == 0 && most_rows == height && end - begin >= height) {
      images = smaller(most_images, (end - begin) / height);
      rows = height;
    } else {
      images = 1;
      rows = smaller(smaller(most_rows, height - first), end - begin);
    }
    const int64_t size = g.source_h * g.source_w * g.source_c, from_row = first * g.source_step_h + g.low_h;
    const T* from = images_start + image * size;
    if (copied) {
      const int64_t step = g.source_rows(rows) * width * g.source_c;
      for (int64_t n = 0; n < images; ++n) copy_within_zeros(from + n * size, from_row, copy + n * step);
      source = copy;
    } else {
      source = from + (from_row * g.source_w + g.low_w) * g.source_c;
    }
    return begin + images * rows;
  }

  void copy_within_zeros(const T* from, int64_t from_row, T* to) const {
    const int64_t line = width * g.source_c, left = smaller(width, larger(0, -g.low_w));
    const int64_t skipped = larger(0, g.low_w), here = larger(0, smaller(width - left, g.source_w - skipped));
    for (int64_t r = from_row; r < from_row + g.source_rows(rows); ++r, to += line) {
      if (r < 0 || r >= g.source_h) {
        fill_zero(to, line);
        continue;
      }
      fill_zero(to, left * g.source_c);
      memcpy(to + left * g.source_c, from + (r * g.source_w + skipped) * g.source_c,
             size_t(here * g.source_c) * sizeof(T));
      fill_zero(to + (left + here) * g.source_c, (width - left - here) * g.source_c);
    }
  }

  // Where the block's first pixel is in the output.
  int64_t out_start() const { return (image * g.out_h + first * g.out_step_h) * g.out_w * g.out_c; }

  // How many pixels of a phase are in this block, in its tables: those of the largest block, whose start serves others.
  int64_t pixels_of(int64_t phase_index) {
    const cpu::ConvPhase& phase = g.phases[phase_index];
    const int64_t height = divide_up(g.out_h - phase.first_h, g.out_step_h);
    const int64_t columns = divide_up(g.out_w - phase.first_w, g.out_step_w);
    if (shown_phase != phase_index) {
      shown_phase = phase_index;
      const int64_t step = (copied ? g.source_rows(most_rows) : g.source_h) * width * g.source_c;
      int32_t *from = row, *to = out_row;
      for (int64_t n = 0; n < most_images; ++n)
        for (int64_t i = 0; i < smaller(most_rows, height); ++i) {
          int64_t in = n * step + i * g.source_step_h * width * g.source_c;
          int64_t out = ((n * g.out_h + phase.first_h + i * g.out_step_h) * g.out_w + phase.first_w) * g.out_c;
          for (int64_t j = 0; j < columns; ++j, in += g.source_step_w * g.source_c, out += g.out_step_w * g.out_c) {
            *from++ = int32_t(in);
            *to++ = int32_t(out);
          }
        }
    }
    return images * larger(0, smaller(rows, height - first)) * columns;
  }

  // Where a phase's taps read, tap by tap each channel of a group.
  void steps_of(const cpu::ConvPhase& phase, int32_t* step) const {
    for (int64_t t = 0; t < phase.tap_count; ++t) {
      const cpu::ConvTap& tap = g.taps[phase.taps + t];
      const int64_t from = ((tap.h - g.low_h) * width + tap.w - g.low_w) * g.source_c;
      for (int64_t c = 0; c < g.source_channels(); ++c) *step++ = int32_t(from + c);
    }
  }

 private:
  int64_t shown_phase = -1;  // by the tables
};

}  // namespace fastmeta::FASTMETA_ISA
