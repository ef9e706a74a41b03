// A convolution of one task's images with its weights, its gradient for the images (another convolution: geometry.h
// says how), and its gradient for the weights.
#pragma once

#include "addressed.h"
#include "depthwise.h"
#include "strips.h"
#include "tiles.h"
#include "weights.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct ConvSpace {
  Strips<T> strips;
  int32_t *step, *weight_row;
  T *panels, *start;
  T** tap_row;

  explicit ConvSpace(const cpu::ConvGeometry& g) : strips(g) {
    Carver carver{nullptr};
    carve(carver, g);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    carve(carver, g);
  }
  void carve(Carver& c, const cpu::ConvGeometry& g) {
    strips.carve(c);
    step = c.take<int32_t>(g.kernel * g.source_channels());
    weight_row = c.take<int32_t>(g.transposed ? 0 : g.kernel * g.source_channels());
    tap_row = c.take<T*>(g.transposed ? g.kernel : 0);
    panels = c.take<T>(g.groups * packed_size<T>(g));
    start = c.take<T>(g.groups * padded<T>(g.out_channels()));
  }
};

// Rows [begin, end) of the images.
template <class T>
void conv_rows(const cpu::ConvItem<T>& item) {
  const cpu::ConvGeometry& g = *item.geometry;
  ConvSpace<T> space(g);
  Strips<T>& strips = space.strips;
  const int64_t channels = g.source_channels(), columns = g.out_channels(), width = padded<T>(columns);
  if (!g.transposed) weight_rows(g, space.weight_row);
  fill_zero(space.start, g.groups * width);
  for (int64_t group = 0; group < g.groups; ++group) {
    T* to = space.panels + group * packed_size<T>(g);
    if (g.transposed)
      pack_weights_transposed(g, group, item.weight, space.tap_row, to);
    else
      pack_weights(g, group, item.weight, space.weight_row, to);
    if (item.bias) memcpy(space.start + group * width, item.bias + group * columns, size_t(columns) * sizeof(T));
  }
  int32_t* step = space.step;
  for (int64_t p = 0; p < g.phase_count; ++p, step += g.phases[p - 1].tap_count * channels)
    strips.steps_of(g.phases[p], step);
  for (int64_t begin = item.begin; begin < item.end;) {
    begin = strips.take(item.source, begin, item.end);
    int64_t steps_before = 0;
    for (int64_t p = 0; p < g.phase_count; ++p) {
      const int64_t pixels = strips.pixels_of(p), depth = g.phases[p].tap_count * channels;
      for (int64_t group = 0; group < g.groups; ++group)
        multiply_addressed(Addressed<T>{
            strips.source + group * channels, strips.row, pixels, space.step + steps_before, depth,
            Right<T>{space.panels + group * packed_size<T>(g) + width * steps_before, 0, larger(1, depth)}, columns,
            item.out + strips.out_start() + group * columns, strips.out_row, space.start + group * width, false});
      steps_before += depth;
    }
  }
}

template <class T>
bool finite_numbers(const T* x, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> lost = {};
  for (int64_t i = 0; i < n; i += W) lost += load_first(x + i, smaller(W, n - i)) * T(0);
  return all_finite<T>(lost);
}

// Image by image what tiles left with a number that is not finite.
template <class T>
void conv_lost_images(cpu::ConvItem<T> item) {
  const cpu::ConvGeometry& g = *item.geometry;
  const int64_t lines = g.lines(sizeof(T)), last = item.end;
  for (int64_t line = item.begin, image, end; line < last; line = end) {
    image = line / lines;
    end = smaller(last, (image + 1) * lines);
    item.begin = image * g.out_h + line % lines * 2;
    item.end = image * g.out_h + smaller(g.out_h, (end - image * lines) * 2);
    const int64_t row = g.out_w * g.out_c;
    if (!finite_numbers(item.out + item.begin * row, (item.end - item.begin) * row)) conv_rows(item);
  }
}

template <class T>
void conv(const cpu::ConvItem<T>& item) {
  const cpu::ConvGeometry& g = *item.geometry;
  if (is_depthwise(g)) return depthwise(item);
  if (!g.tiled(sizeof(T))) return conv_rows(item);
  if (!conv_by_tiles(item)) conv_lost_images(item);
}

template <class T>
struct ConvWeightSpace {
  Strips<T> strips;
  int32_t *step, *weight_row, *sum_row;
  T *gradient, *sums, *zeros;

  explicit ConvWeightSpace(const cpu::ConvGeometry& g) : strips(g) {
    Carver carver{nullptr};
    carve(carver, g);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    carve(carver, g);
  }
  void carve(Carver& c, const cpu::ConvGeometry& g) {
    const int64_t steps = g.kernel * g.source_channels(), width = padded<T>(g.out_channels());
    strips.carve(c);
    step = c.take<int32_t>(steps);
    weight_row = c.take<int32_t>(steps);
    sum_row = c.take<int32_t>(steps);
    gradient = c.take<T>(width * strips.most_pixels());
    sums = c.take<T>(g.groups * width * steps);
    zeros = c.take<T>(width);
  }
};

// Rows of `from` [rows, columns] in panels, as they stand: a row at a time, since they may come from far away.
template <class T>
void pack_rows(int64_t rows, int64_t columns, const T* from, int64_t ld, T* to) {
  constexpr int W = kWidth<T>;
  const int64_t vectors = divide_up(columns, W);
  for (int64_t i = 0; i < rows; ++i, from += ld) {
    T* panel = to;
    for (int64_t v = 0, width; v < vectors; panel += rows * width * W, v += width) {
      width = panel_vectors(vectors - v);
      for (int64_t u = v; u < v + width; ++u) {
        T* out = panel + (i * width + u - v) * W;
        if ((u + 1) * W <= columns)
          store(out, load(from + u * W));
        else
          store(out, load_first(from + u * W, columns - u * W));
      }
    }
  }
}

template <class T>
void conv_weight_rows(const cpu::ConvWeightItem<T>& item) {
  const cpu::ConvGeometry& g = *item.geometry;
  ConvWeightSpace<T> space(g);
  Strips<T>& strips = space.strips;
  const int64_t channels = g.source_channels(), columns = g.out_channels(), width = padded<T>(columns);
  const int64_t steps = g.kernel * channels;
  weight_rows(g, space.weight_row);
  strips.steps_of(g.phases[0], space.step);
  for (int64_t k = 0; k < steps; ++k) space.sum_row[k] = int32_t(k * width);
  fill_zero(space.zeros, width);
  if (item.begin == item.end) fill_zero(space.sums, g.groups * width * steps);
  for (int64_t begin = item.begin; begin < item.end;) {
    const bool starts = begin == item.begin;
    begin = strips.take(item.source, begin, item.end);
    const int64_t pixels = strips.pixels_of(0);
    for (int64_t group = 0; group < g.groups; ++group) {
      pack_rows(pixels, columns, item.grad + strips.out_start() + group * columns, g.out_c, space.gradient);
      multiply_addressed(Addressed<T>{strips.source + group * channels, space.step, steps, strips.row, pixels,
                                      Right<T>{space.gradient, 0, pixels}, columns,
                                      space.sums + group * width * steps, space.sum_row, space.zeros, !starts});
    }
  }
  for (int64_t group = 0; group < g.groups; ++group)
    unpack_weights(g, group, space.sums + group * width * steps, space.weight_row, item.d_weight);
}

template <class T>
void conv_weight(const cpu::ConvWeightItem<T>& item) {
  const cpu::ConvGeometry& g = *item.geometry;
  if (is_depthwise(g)) return depthwise_weight(item);
  if (g.tiled(sizeof(T))) {
    if (conv_weight_by_tiles(item)) return;
    const int64_t lines = g.lines(sizeof(T));
    const auto row = [&](int64_t line) { return line / lines * g.out_h + line % lines * 2; };
    cpu::ConvWeightItem<T> rows = item;
    rows.begin = row(item.begin), rows.end = row(item.end);
    return conv_weight_rows(rows);
  }
  conv_weight_rows(item);
}

}  // namespace fastmeta::FASTMETA_ISA
