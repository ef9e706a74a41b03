// Small strided matrix products in registers, and the same frame for sums of squared or absolute differences.
//
//   C[i, j] = finish( sum_k combine(A[i, k], B[k, j]) )
//
// A is read element by element (broadcast), so any row and column stride serves; B has unit column stride, as it stands
// or in panels (see `Right`); C has unit column stride. Nothing is allocated. Rows are dealt out evenly over the tiles:
// a last tile of one or two rows would wait for its own additions.
#pragma once

#include <fastmeta/simd.h>

namespace fastmeta::FASTMETA_ISA {

enum class Combine { product, squared_difference, absolute_difference };

// What happens to a finished sum, in this order.
template <class T>
struct Finish {
  enum Then { nothing, relu, scale, root, cosine };
  bool add = false;                // C += instead of C =
  const T* row_start = nullptr;    // one number per row, added
  Then then = nothing;             // cosine: 1 - value * row_factor[i] * column_factor[j]
  T factor = 1;                    // of `scale`
  const T* row_factor = nullptr;
  const T* column_factor = nullptr;  // readable up to the padded column count
};

// B [depth, columns]. In panels (packed), the columns from vector v on start at data + v * width * depth and the row
// stride is the panel's own width.
template <class T>
struct Right {
  const T* data;
  int64_t ld;         // row stride as it stands; unused in panels
  int64_t depth = 0;  // rows of the panels; 0: not in panels
  bool padded = false;  // whole vectors may be read at the end of a row
};

constexpr int64_t kDepthBlock = 256;  // 256 rows of a two-vector panel are half of a first-level cache
constexpr int64_t kRowBlock = 96;

// Vectors of the next panel: two or three, so that no single one is left over.
FM_INLINE int64_t panel_vectors(int64_t left) { return left <= 3 ? left : left == 4 || left % 2 == 0 ? 2 : 3; }
constexpr int panel_rows(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 6 : 4; }

template <class T, Combine kCombine>
FM_INLINE Vec<T> combine(Vec<T> a, Vec<T> b, Vec<T> sum) {
  if constexpr (kCombine == Combine::product) return sum + a * b;
  const Vec<T> difference = a - b;
  if constexpr (kCombine == Combine::squared_difference) return sum + difference * difference;
  return sum + absolute(difference);
}

// The rarer ends, out of line: `sums` [rows, vectors] of one tile.
template <class T>
__attribute__((noinline)) void finish_rarely(const T* sums, int64_t rows, int64_t vectors, T* c, int64_t ldc,
                                             int64_t last, const Finish<T>& f, int64_t i0, int64_t j0) {
  constexpr int W = kWidth<T>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      T* out = c + r * ldc + v * W;
      const int64_t n = v == vectors - 1 ? last : W;
      Vec<T> x = load(sums + (r * vectors + v) * W);
      if (f.add) x += load_first(out, n);
      if (f.row_start) x += broadcast(f.row_start[i0 + r]);
      if (f.then == Finish<T>::relu) x = maximum(Vec<T>{}, x);
      if (f.then == Finish<T>::scale) x *= broadcast(f.factor);
      if (f.then == Finish<T>::root) x = square_root(x);
      if (f.then == Finish<T>::cosine)
        x = 1 - x * broadcast(f.row_factor[i0 + r]) * load(f.column_factor + j0 + v * W);
      store_first(out, x, n);
    }
  }
}

template <class T>
struct Tile {
  int64_t depth;
  const T* a;
  int64_t row_stride, depth_stride;
  const T* b;
  int64_t ldb;
  T* c;
  int64_t ldc;
  int64_t last;  // columns in the last vector
  int64_t i0, j0;
};

template <class T, Combine kCombine, int kRows, int kVectors, bool kMasked>
void tile(const Tile<T>& t, const Finish<T>& f) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[kRows][kVectors];
  FM_UNROLL for (int r = 0; r < kRows; ++r)
    FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  const T* a[kRows];
  FM_UNROLL for (int r = 0; r < kRows; ++r) a[r] = t.a + r * t.row_stride;
  const T* b = t.b;
  const int64_t ldb = t.ldb, step = t.depth_stride, last = t.last, end = t.depth * step;
  // depth_stride is never 0: the driver sees to it
  for (int64_t k = 0; k != end; k += step, b += ldb) {
    Vec<T> right[kVectors];
    FM_UNROLL for (int v = 0; v < kVectors; ++v)
      right[v] = kMasked && v == kVectors - 1 ? load_first(b + v * W, last) : load(b + v * W);
    if (kRows > 1)
      FM_UNROLL for (int v = 0; v < kVectors; ++v) keep_in_register(right[v]);
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast(a[r][k]);
      FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = combine<T, kCombine>(left, right[v], sum[r][v]);
    }
  }
  if (last == W && f.then <= Finish<T>::relu) {
    const Vec<T> least = broadcast(f.then == Finish<T>::relu ? T(0) : -T(__builtin_inff()));
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> start = f.row_start ? broadcast(f.row_start[t.i0 + r]) : Vec<T>{};
      FM_UNROLL for (int v = 0; v < kVectors; ++v) {
        T* out = t.c + r * t.ldc + v * W;
        Vec<T> x = sum[r][v] + start;
        if (f.add) x += load(out);
        store(out, maximum(least, x));
      }
    }
    return;
  }
  alignas(64) T sums[kRows * kVectors * W];
  FM_UNROLL for (int r = 0; r < kRows; ++r)
    FM_UNROLL for (int v = 0; v < kVectors; ++v) store(sums + (r * kVectors + v) * W, sum[r][v]);
  finish_rarely(sums, kRows, kVectors, t.c, t.ldc, last, f, t.i0, t.j0);
}

template <class T>
using TileFunction = void (*)(const Tile<T>&, const Finish<T>&);

// tile functions by number of rows, 1 to 8
template <class T, Combine kCombine, int kVectors, bool kMasked>
inline constexpr TileFunction<T> kTiles[8] = {
    tile<T, kCombine, 1, kVectors, kMasked>,
    tile<T, kCombine, 2, kVectors, kMasked>,
    tile<T, kCombine, 3, kVectors, kMasked>,
    tile<T, kCombine, 4, kVectors, kMasked>,
    tile<T, kCombine, panel_rows(kVectors) >= 5 ? 5 : 1, kVectors, kMasked>,
    tile<T, kCombine, panel_rows(kVectors) >= 6 ? 6 : 1, kVectors, kMasked>,
    tile<T, kCombine, panel_rows(kVectors) >= 7 ? 7 : 1, kVectors, kMasked>,
    tile<T, kCombine, panel_rows(kVectors) >= 8 ? 8 : 1, kVectors, kMasked>,
};

template <class T, Combine kCombine, int kVectors, bool kMasked>
void panel(int64_t rows, Tile<T> t, const Finish<T>& f) {
  constexpr int kMost = panel_rows(kVectors);
  for (int64_t tiles = divide_up(rows, kMost); tiles > 0; --tiles) {
    const int64_t here = divide_up(rows, tiles);
    kTiles<T, kCombine, kVectors, kMasked>[here - 1](t, f);
    rows -= here;
    t.a += here * t.row_stride;
    t.c += here * t.ldc;
    t.i0 += here;
  }
}

template <class T, Combine kCombine, bool kMasked>
FM_INLINE void panel_of(int64_t vectors, int64_t rows, const Tile<T>& t, const Finish<T>& f) {
  if (vectors == 1) panel<T, kCombine, 1, kMasked>(rows, t, f);
  if (vectors == 2) panel<T, kCombine, 2, kMasked>(rows, t, f);
  if (vectors == 3) panel<T, kCombine, 3, kMasked>(rows, t, f);
}

// C [rows, columns] from A (row stride, column stride) and B; depth may be 0.
template <class T, Combine kCombine = Combine::product>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t row_stride, int64_t depth_stride,
              Right<T> b, T* c, int64_t ldc, const Finish<T>& finish) {
  constexpr int W = kWidth<T>;
  if (rows == 0 || columns == 0) return;
  const int64_t vectors = divide_up(columns, W), tail = columns - (vectors - 1) * W;
  const bool masked = kCombine == Combine::product && tail != W && !b.padded && b.depth == 0;
  Finish<T> first = finish, middle, end = finish;
  first.then = Finish<T>::nothing;
  middle.add = end.add = true;
  end.row_start = nullptr;
  for (int64_t i = 0; i < rows; i += kRowBlock) {
    const int64_t block = smaller(kRowBlock, rows - i);
    for (int64_t k = 0; k == 0 || k < depth; k += kDepthBlock) {
      const bool starts = k == 0, ends = k + kDepthBlock >= depth;
      const Finish<T>& f = starts && ends ? finish : starts ? first : ends ? end : middle;
      for (int64_t v = 0, width; v < vectors; v += width) {
        width = panel_vectors(vectors - v);
        const bool at_end = v + width == vectors;
        const int64_t ldb = b.depth ? width * W : b.ld;
        const T* panel_start = b.data + (b.depth ? v * W * b.depth : v * W) + k * ldb;
        const Tile<T> t{smaller(kDepthBlock, depth - k), a + i * row_stride + k * depth_stride, row_stride,
                        depth_stride ? depth_stride : 1, panel_start, ldb, c + i * ldc + v * W, ldc,
                        at_end ? tail : W, i, v * W};
        if constexpr (kCombine == Combine::product) {
          if (at_end && masked) {
            panel_of<T, kCombine, true>(width, block, t, f);
            continue;
          }
        }
        panel_of<T, kCombine, false>(width, block, t, f);
      }
    }
  }
}

// Panels of B^T from rows of `from` [columns, depth]: what `multiply` reads as Right{to, 0, depth}. `to` holds
// padded(columns) * depth numbers; padding columns are zero.
template <class T>
void pack_transposed(int64_t columns, int64_t depth, const T* from, int64_t ld, T* to) {
  constexpr int W = kWidth<T>;
  const int64_t vectors = divide_up(columns, W);
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = panel_vectors(vectors - v);
    const int64_t start = v * W;
    transpose(smaller(width * W, columns - start), depth, from + start * ld, ld, to + start * depth, width * W,
              width * W);
  }
}

// Gradients of sums over differences: C[i, j] (+)= sum_k A[i, k] * along(X[i, j] - B[k, j]), where `along` is the
// difference itself or its sign. Differences first, so that a common offset of X and B costs no accuracy.
template <class T, bool kSign, int kRows, int kVectors, bool kMasked>
void difference_tile(int64_t depth, const T* a, int64_t row_stride, int64_t depth_stride, const T* x, int64_t ldx,
                     const T* b, int64_t ldb, T* c, int64_t ldc, int64_t last, bool add) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[kRows][kVectors], own[kRows][kVectors];
  FM_UNROLL for (int r = 0; r < kRows; ++r)
    FM_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec<T>{};
      own[r][v] = kMasked && v == kVectors - 1 ? load_first(x + r * ldx + v * W, last) : load(x + r * ldx + v * W);
    }
  for (int64_t k = 0; k < depth; ++k, b += ldb, a += depth_stride) {
    Vec<T> right[kVectors];
    FM_UNROLL for (int v = 0; v < kVectors; ++v)
      right[v] = kMasked && v == kVectors - 1 ? load_first(b + v * W, last) : load(b + v * W);
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast(a[r * row_stride]);
      FM_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Vec<T> d = own[r][v] - right[v];
        if constexpr (kSign)
          sum[r][v] += left * (d > 0 ? broadcast(T(1)) : d < 0 ? broadcast(T(-1)) : Vec<T>{});
        else
          sum[r][v] += left * d;
      }
    }
  }
  FM_UNROLL for (int r = 0; r < kRows; ++r)
    FM_UNROLL for (int v = 0; v < kVectors; ++v) {
      T* out = c + r * ldc + v * W;
      const int64_t n = v == kVectors - 1 ? last : W;
      store_first(out, add ? sum[r][v] + load_first(out, n) : sum[r][v], n);
    }
}

template <class T, bool kSign>
void multiply_differences(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t row_stride,
                          int64_t depth_stride, const T* x, int64_t ldx, const T* b, int64_t ldb, T* c, int64_t ldc,
                          bool add) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < columns;) {
    const bool two = columns - j >= 2 * W;
    const int64_t last = two ? W : smaller(W, columns - j);
    int64_t i = 0;
#define FM_ROWS(R)                                                                                              \
  for (; i + R <= rows; i += R) {                                                                               \
    const T* ai = a + i * row_stride;                                                                           \
    const T* xi = x + i * ldx + j;                                                                              \
    T* ci = c + i * ldc + j;                                                                                    \
    if (two)                                                                                                    \
      difference_tile<T, kSign, R, 2, false>(depth, ai, row_stride, depth_stride, xi, ldx, b + j, ldb, ci, ldc, \
                                             last, add);                                                        \
    else                                                                                                        \
      difference_tile<T, kSign, R, 1, true>(depth, ai, row_stride, depth_stride, xi, ldx, b + j, ldb, ci, ldc,  \
                                            last, add);                                                         \
  }
    FM_ROWS(3)
    FM_ROWS(2)
    FM_ROWS(1)
#undef FM_ROWS
    j += two ? 2 * W : W;
  }
}

}  // namespace fastmeta::FASTMETA_ISA
