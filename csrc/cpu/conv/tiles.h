// Convolutions of 3 x 3 taps in fewer products: Winograd's minimal filtering F(2 x 2, 3 x 3) (S. Winograd, Arithmetic
// Complexity of Computations, 1980; A. Lavin and S. Gray, arXiv:1509.09308). A tile of 2 x 2 outputs reads 4 x 4 source
// pixels; 16 sums and differences of them, times 16 of the taps, are summed over the channels, and the outputs are sums
// of these 16 sums: 16 products in place of 36. The gradient of the weights goes the same way back.
//
// The sums have a few more roundings than the plain convolution, and a number that is not finite would spread over its
// tile: an image with one is computed again without tiles.
#pragma once

#include "../carver.h"
#include "weights.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int kFrequencies = 16;
constexpr int64_t kTileBytes = 1 << 19;  // of a block: a second-level cache
constexpr int64_t kLeastTiles = 48, kMostTiles = 96;  // fewer would wait for the weights, of which each block reads all
constexpr int64_t kMostOfWide = 192;  // of many channels, so that this is not more than what the block has of its own

// ---- the sums of one vector of channels, along both axes

template <class V>
FM_INLINE void to_frequencies(V (&d)[4][4]) {
  FM_UNROLL for (int j = 0; j < 4; ++j) {
    const V second = d[1][j], third = d[2][j];
    d[0][j] -= third;
    d[1][j] = second + third;
    d[2][j] = third - second;
    d[3][j] = second - d[3][j];
  }
  FM_UNROLL for (int i = 0; i < 4; ++i) {
    const V second = d[i][1], third = d[i][2];
    d[i][0] -= third;
    d[i][1] = second + third;
    d[i][2] = third - second;
    d[i][3] = second - d[i][3];
  }
}

template <class V>
FM_INLINE void to_pixels(const V (&m)[4][4], V (&y)[2][2]) {
  V t[2][4];
  FM_UNROLL for (int j = 0; j < 4; ++j) {
    t[0][j] = m[0][j] + m[1][j] + m[2][j];
    t[1][j] = m[1][j] - m[2][j] - m[3][j];
  }
  FM_UNROLL for (int i = 0; i < 2; ++i) {
    y[i][0] = t[i][0] + t[i][1] + t[i][2];
    y[i][1] = t[i][1] - t[i][2] - t[i][3];
  }
}

// The adjoint of `to_pixels`.
template <class V>
FM_INLINE void from_pixels(const V (&y)[2][2], V (&m)[4][4]) {
  V t[4][2];
  FM_UNROLL for (int j = 0; j < 2; ++j) {
    t[0][j] = y[0][j];
    t[1][j] = y[0][j] + y[1][j];
    t[2][j] = y[0][j] - y[1][j];
    t[3][j] = -y[1][j];
  }
  FM_UNROLL for (int i = 0; i < 4; ++i) {
    m[i][0] = t[i][0];
    m[i][1] = t[i][0] + t[i][1];
    m[i][2] = t[i][0] - t[i][1];
    m[i][3] = -t[i][1];
  }
}

template <class T, class V>
FM_INLINE void from_taps(const V (&g)[3][3], V (&u)[4][4]) {
  V t[4][3];
  FM_UNROLL for (int j = 0; j < 3; ++j) {
    const V outer = T(0.5) * (g[0][j] + g[2][j]), middle = T(0.5) * g[1][j];
    t[0][j] = g[0][j];
    t[1][j] = outer + middle;
    t[2][j] = outer - middle;
    t[3][j] = g[2][j];
  }
  FM_UNROLL for (int i = 0; i < 4; ++i) {
    const V outer = T(0.5) * (t[i][0] + t[i][2]), middle = T(0.5) * t[i][1];
    u[i][0] = t[i][0];
    u[i][1] = outer + middle;
    u[i][2] = outer - middle;
    u[i][3] = t[i][2];
  }
}

// The adjoint of `from_taps`.
template <class T, class V>
FM_INLINE void to_taps(const V (&u)[4][4], V (&g)[3][3]) {
  V t[3][4];
  FM_UNROLL for (int j = 0; j < 4; ++j) {
    const V sum = T(0.5) * (u[1][j] + u[2][j]);
    t[0][j] = u[0][j] + sum;
    t[1][j] = T(0.5) * (u[1][j] - u[2][j]);
    t[2][j] = sum + u[3][j];
  }
  FM_UNROLL for (int i = 0; i < 3; ++i) {
    const V sum = T(0.5) * (t[i][1] + t[i][2]);
    g[i][0] = t[i][0] + sum;
    g[i][1] = T(0.5) * (t[i][1] - t[i][2]);
    g[i][2] = sum + t[i][3];
  }
}

// ---- tiles of images

// Where N x N pixels of an image [height, width, channels] stand, from pixel (first_h, first_w) on; `beyond` for those
// that the image does not have.
template <class P, int N>
struct TilePixels {
  P at[N][N];

  FM_INLINE TilePixels(P image, int64_t height, int64_t width, int64_t channels, int64_t first_h, int64_t first_w,
                       P beyond) {
    FM_UNROLL for (int i = 0; i < N; ++i)
      FM_UNROLL for (int j = 0; j < N; ++j) {
        const int64_t h = first_h + i, w = first_w + j;
        const bool inside = h >= 0 && h < height && w >= 0 && w < width;
        at[i][j] = inside ? image + (h * width + w) * channels : beyond;
      }
  }
};

// Blocks of tiles, counted on from line to line and image to image.
struct TileWalk {
  const cpu::ConvGeometry& g;
  int64_t lines, columns;  // of tiles of an image
  int64_t line, column;    // of the next tile; lines of all images

  explicit TileWalk(const cpu::ConvGeometry& g, int64_t begin)
      : g(g), lines(divide_up(g.out_h, 2)), columns(divide_up(g.out_w, 2)), line(begin), column(0) {}

  // visit(n, image, i, j) for the next `count` tiles
  template <class Visit>
  FM_INLINE void next(int64_t count, const Visit& visit) {
    int64_t image = line / lines, i = line % lines;
    for (int64_t n = 0; n < count; ++n) {
      visit(n, image, i, column);
      if (++column < columns) continue;
      column = 0;
      ++line;
      if (++i == lines) i = 0, ++image;
    }
  }
};

template <class T>
struct TileSpace {
  int64_t source_width, out_width, most;  // channels in whole vectors; tiles of a block
  int64_t source_step, out_step;          // from frequency to frequency: never whole pages apart
  int64_t panel_step;
  // [16][tiles][channels]; weights, or for their gradient the sums, by frequency and by tap; where outputs start
  T *source, *out, *weights, *taps, *start;
  T *beyond, *dropped;  // pixels that an image does not have: zeros to read, and room to write

  TileSpace(const cpu::ConvGeometry& g, bool of_weights) {
    source_width = padded<T>(g.source_c), out_width = padded<T>(g.out_c);
    most = kTileBytes / (kFrequencies * (source_width + out_width) * int64_t(sizeof(T)));
    most = smaller(kMostTiles, larger(kLeastTiles, most / 6 * 6));
    most = larger(most, smaller(kMostOfWide, source_width * out_width / (source_width + out_width)) / 6 * 6);
    source_step = most * source_width + 16, out_step = most * out_width + 16;
    panel_step = g.source_c * out_width + 16;
    Carver carver{nullptr};
    carve(carver, g, of_weights);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    carve(carver, g, of_weights);
  }
  void carve(Carver& c, const cpu::ConvGeometry& g, bool of_weights) {
    source = c.take<T>(kFrequencies * source_step);
    out = c.take<T>(kFrequencies * out_step);
    weights = c.take<T>(kFrequencies * panel_step);
    taps = c.take<T>(of_weights ? 9 * g.source_c * out_width : 9 * g.source_c * kWidth<T>);
    start = c.take<T>(out_width);
    beyond = c.take<T>(larger(source_width, out_width));
    dropped = c.take<T>(out_width);
  }
};

// What 4 x 4 source pixels come to, one row of `source` for each frequency.
template <class T>
FM_INLINE void source_tile(const TilePixels<const T*, 4>& pixel, int64_t channels, T* to, int64_t step) {
  constexpr int W = kWidth<T>;
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t lanes = smaller(W, channels - c);
    Vec<T> d[4][4];
    FM_UNROLL for (int i = 0; i < 4; ++i)
      FM_UNROLL for (int j = 0; j < 4; ++j)
        d[i][j] = lanes == W ? load(pixel.at[i][j] + c) : load_first(pixel.at[i][j] + c, lanes);
    to_frequencies(d);
    FM_UNROLL for (int f = 0; f < kFrequencies; ++f) store(to + f * step + c, d[f / 4][f % 4]);
  }
}

template <class T>
void source_tiles(const cpu::ConvGeometry& g, TileWalk walk, int64_t tiles, const T* images, const TileSpace<T>& s) {
  const int64_t size = g.source_h * g.source_w * g.source_c;
  walk.next(tiles, [&](int64_t n, int64_t image, int64_t i, int64_t j) FM_CONV_INLINE {
    const TilePixels<const T*, 4> pixel(images + image * size, g.source_h, g.source_w, g.source_c, 2 * i + g.low_h,
                                        2 * j + g.low_w, s.beyond);
    source_tile(pixel, g.source_c, s.source + n * s.source_width, s.source_step);
  });
}

// ---- the convolution

// 3 x 3 taps' panels for each frequency: matrices [source channels, out channels].
template <class T>
void tile_weights(const cpu::ConvGeometry& g, const T* weight, TileSpace<T>& s) {
  constexpr int W = kWidth<T>, B = kPackBlock<T>;
  const int64_t columns = g.out_c, channels = g.source_c, vectors = divide_up(columns, W);
  int64_t index[3][3];
  for (const cpu::ConvTap* tap = g.taps; tap < g.taps + 9; ++tap)
    index[tap->h - g.low_h][tap->w - g.low_w] = tap->index;
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = panel_vectors(vectors - v);
    for (int64_t u = v; u < v + width; ++u) {
      for (int64_t j = 0; j < W; j += B) {
        const int64_t o = u * W + j, rows = larger(0, smaller(B, columns - o));
        if (g.transposed)
          for (int64_t c = 0; c < channels; ++c)
            scatter_columns(rows, 9, weight + (c * columns + smaller(o, columns)) * 9, 9,
                            [=](int64_t tap) { return s.taps + (c * 9 + tap) * W + j; });
        else
          scatter_columns(rows, channels * 9, weight + smaller(o, columns) * channels * 9, channels * 9,
                          [=](int64_t k) { return s.taps + k * W + j; });
      }
      T* to = s.weights + v * W * channels + (u - v) * W;
      for (int64_t c = 0; c < channels; ++c, to += width * W) {
        Vec<T> taps[3][3], found[4][4];
        FM_UNROLL for (int i = 0; i < 3; ++i)
          FM_UNROLL for (int j = 0; j < 3; ++j) taps[i][j] = load(s.taps + (c * 9 + index[i][j]) * W);
        from_taps<T>(taps, found);
        FM_UNROLL for (int f = 0; f < kFrequencies; ++f) store(to + f * s.panel_step, found[f / 4][f % 4]);
      }
    }
  }
}

// 2 x 2 outputs of the 16 sums; `lost` is NaN in a lane where one was not finite.
template <class T>
FM_INLINE void out_tile(const TilePixels<T*, 2>& pixel, int64_t channels, const T* from, int64_t step, const T* start,
                        Vec<T>& lost) {
  constexpr int W = kWidth<T>;
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t lanes = smaller(W, channels - c);
    Vec<T> m[4][4], y[2][2];
    FM_UNROLL for (int f = 0; f < kFrequencies; ++f) m[f / 4][f % 4] = load(from + f * step + c);
    to_pixels(m, y);
    const Vec<T> first = load(start + c);
    FM_UNROLL for (int i = 0; i < 2; ++i)
      FM_UNROLL for (int j = 0; j < 2; ++j) {
        const Vec<T> value = first + y[i][j];
        lost += value * T(0);
        if (lanes == W)
          store(pixel.at[i][j] + c, value);
        else
          store_first(pixel.at[i][j] + c, value, lanes);
      }
  }
}

template <class T>
FM_INLINE bool all_finite(Vec<T> lost) {
  return sum_of_lanes<T>(lost) == T(0);
}

// Whether all that was written is finite.
template <class T>
bool conv_by_tiles(const cpu::ConvItem<T>& item) {
  const cpu::ConvGeometry& g = *item.geometry;
  TileSpace<T> s(g, false);
  tile_weights(g, item.weight, s);
  fill_zero(s.start, s.out_width);
  fill_zero(s.beyond, s.source_width);
  if (item.bias) memcpy(s.start, item.bias, size_t(g.out_c) * sizeof(T));
  TileWalk walk(g, item.begin);
  const int64_t size = g.out_h * g.out_w * g.out_c;
  Vec<T> lost = {};
  for (int64_t left = (item.end - item.begin) * walk.columns, tiles; left > 0; left -= tiles) {
    tiles = smaller(s.most, left);
    source_tiles(g, walk, tiles, item.source, s);
    for (int f = 0; f < kFrequencies; ++f)
      multiply<T>(tiles, s.out_width, g.source_c, s.source + f * s.source_step, s.source_width, 1,
                  Right<T>{s.weights + f * s.panel_step, 0, g.source_c}, s.out + f * s.out_step, s.out_width, {});
    walk.next(tiles, [&](int64_t n, int64_t image, int64_t i, int64_t j) FM_CONV_INLINE {
      const TilePixels<T*, 2> pixel(item.out + image * size, g.out_h, g.out_w, g.out_c, 2 * i, 2 * j, s.dropped);
      out_tile(pixel, g.out_c, s.out + n * s.out_width, s.out_step, s.start, lost);
    });
  }
  return all_finite<T>(lost);
}

// ---- the gradient of the weights

template <class T>
FM_INLINE void gradient_tile(const TilePixels<const T*, 2>& pixel, int64_t channels, T* to, int64_t step) {
  constexpr int W = kWidth<T>;
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t lanes = smaller(W, channels - c);
    Vec<T> y[2][2], m[4][4];
    FM_UNROLL for (int i = 0; i < 2; ++i)
      FM_UNROLL for (int j = 0; j < 2; ++j)
        y[i][j] = lanes == W ? load(pixel.at[i][j] + c) : load_first(pixel.at[i][j] + c, lanes);
    from_pixels(y, m);
    FM_UNROLL for (int f = 0; f < kFrequencies; ++f) store(to + f * step + c, m[f / 4][f % 4]);
  }
}

// Whether the gradient is finite.
template <class T>
bool conv_weight_by_tiles(const cpu::ConvWeightItem<T>& item) {
  constexpr int W = kWidth<T>;
  const cpu::ConvGeometry& g = *item.geometry;
  TileSpace<T> s(g, true);
  fill_zero(s.weights, kFrequencies * s.panel_step);
  fill_zero(s.beyond, larger(s.source_width, s.out_width));
  TileWalk walk(g, item.begin);
  const int64_t size = g.out_h * g.out_w * g.out_c;
  Finish<T> add;
  add.add = true;
  for (int64_t left = (item.end - item.begin) * walk.columns, tiles; left > 0; left -= tiles) {
    tiles = smaller(s.most, left);
    source_tiles(g, walk, tiles, item.source, s);
    walk.next(tiles, [&](int64_t n, int64_t image, int64_t i, int64_t j) FM_CONV_INLINE {
      const TilePixels<const T*, 2> pixel(item.grad + image * size, g.out_h, g.out_w, g.out_c, 2 * i, 2 * j, s.beyond);
      gradient_tile(pixel, g.out_c, s.out + n * s.out_width, s.out_step);
    });
    for (int f = 0; f < kFrequencies; ++f)
      multiply<T>(g.source_c, s.out_width, tiles, s.source + f * s.source_step, 1, s.source_width,
                  Right<T>{s.out + f * s.out_step, s.out_width, 0, true}, s.weights + f * s.panel_step, s.out_width,
                  add);
  }
  Vec<T> lost = {};
  for (int64_t c = 0; c < g.source_c; ++c)
    for (int64_t o = 0; o < s.out_width; o += W) {
      Vec<T> sums[4][4], taps[3][3];
      FM_UNROLL for (int f = 0; f < kFrequencies; ++f)
        sums[f / 4][f % 4] = load(s.weights + f * s.panel_step + c * s.out_width + o);
      to_taps<T>(sums, taps);
      FM_UNROLL for (int tap = 0; tap < 9; ++tap) {
        lost += taps[tap / 3][tap % 3] * T(0);
        store(s.taps + (c * 9 + tap) * s.out_width + o, taps[tap / 3][tap % 3]);
      }
    }
  for (int64_t o = 0; o < g.out_c; o += kPackBlock<T>)
    gather_columns(smaller(kPackBlock<T>, g.out_c - o), g.source_c * 9,
                   [&](int64_t k) { return s.taps + k * s.out_width + o; }, item.d_weight + o * g.source_c * 9,
                   g.source_c * 9);
  return all_finite<T>(lost);
}

}  // namespace fastmeta::FASTMETA_ISA
