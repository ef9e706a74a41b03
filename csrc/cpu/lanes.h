// Products of as many tasks at once as a vector has lanes: every number is a vector, with a lane for each task. Nothing
// is padded or transposed, and no sum runs along a vector.
//
//   C[i, j] = start[i, j] + factor * sum_k (A[i, k] B[k, j] + A'[i, k] B'[k, j])
//
// relu goes with the store as in inner_loop/gemm.h. Steps count numbers, whatever the lanes.
#pragma once

#include <fastmeta/simd.h>

namespace fastmeta::FASTMETA_ISA {

// n numbers of each of `count` tasks, `step` apart, to lanes; those without a task become 0. All lanes of some numbers
// before the next: what is written stays in the first-level cache until it is whole.
template <class T>
void to_lanes(int64_t count, int64_t n, const T* from, int64_t step, T* to) {
  constexpr int64_t W = kWidth<T>, B = kBlock<T>;
  const int64_t whole = count == W && W % B == 0 ? n / B * B : 0;
  for (int64_t j = 0; j < whole; j += B)
    for (int64_t i = 0; i < W; i += B) transpose_block<T>(from + i * step + j, step, to + j * W + i, W);
  transpose<T>(count, n - whole, from + whole, step, to + whole * W, W, W);
}

// Numbers of each task; or `shared`: the same for all of them, without lanes.
template <class T>
struct LaneNumbers {
  const T* base = nullptr;
  bool shared = false;
};

template <class T>
struct LaneProduct {
  const T* a;
  int64_t a_row, a_step;
  LaneNumbers<T> b;
  int64_t b_step, b_column;
  int64_t depth;
  T* c;
  int64_t c_row, c_column;
  LaneNumbers<T> start = {};               // none: 0; may be C
  int64_t start_row = 0, start_column = 1;  // a row step of 0 repeats one row
  const T* factor = nullptr;               // a number of each task; none: 1
  bool relu = false;
  const T* mask = nullptr;  // with the steps of C
  const T *other_a = nullptr, *other_b = nullptr;  // with the steps of A and B, none shared
};

// A tile's sums leave registers for the operands.
constexpr int kLaneRows = FASTMETA_VECTOR_BYTES == 64 ? 10 : 6, kLaneColumns = 2;
constexpr int64_t kLanePanelBytes = 28 << 10;

template <class T, bool kShared>
FM_INLINE Vec<T> number_at(const T* base, int64_t i) {
  if constexpr (kShared) return broadcast(base[i]);
  return load(base + i * kWidth<T>);
}

template <class T, bool kShared, int kRows, int kColumns>
FM_INLINE void add_product(const LaneProduct<T>& p, const T* a, const T* b, int64_t i, int64_t j,
                           Vec<T> (&sum)[kRows][kColumns]) {
  constexpr int64_t W = kWidth<T>, lanes = kShared ? 1 : W;
  const int64_t row = p.a_row * W, step = p.a_step * W, b_step = p.b_step * lanes, column = p.b_column;
  a += i * row;
  b += j * column * lanes;
  for (int64_t k = p.depth; k > 0; --k, a += step, b += b_step) {
    Vec<T> right[kColumns];
    FM_UNROLL for (int c = 0; c < kColumns; ++c) {
      right[c] = number_at<T, kShared>(b, c * column);
      keep_in_register(right[c]);
    }
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      Vec<T> left = load(a + r * row);
      if (kColumns > 1) keep_in_register(left);
      FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] += left * right[c];
    }
  }
}

template <class T, bool kShared, int kRows, int kColumns>
FM_INLINE void add_start(const LaneProduct<T>& p, int64_t i, int64_t j, Vec<T> (&sum)[kRows][kColumns]) {
  constexpr int64_t lanes = kShared ? 1 : kWidth<T>;
  const int64_t row = p.start_row * lanes, column = p.start_column;
  const T* start = p.start.base + i * row + j * column * lanes;
  if (row == 0) {
    FM_UNROLL for (int c = 0; c < kColumns; ++c) {
      const Vec<T> first = number_at<T, kShared>(start, c * column);
      FM_UNROLL for (int r = 0; r < kRows; ++r) sum[r][c] += first;
    }
    return;
  }
  FM_UNROLL for (int r = 0; r < kRows; ++r, start += row)
    FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] += number_at<T, kShared>(start, c * column);
}

// Tiles side by side, columns [j, end).
template <class T, int kRows, int kColumns>
__attribute__((noinline)) void lane_tiles(const LaneProduct<T>& p, int64_t i, int64_t j, int64_t end) {
  constexpr int64_t W = kWidth<T>;
  const int64_t row = p.c_row * W, column = p.c_column * W;
  for (; j < end; j += kColumns) {
    Vec<T> sum[kRows][kColumns];
    FM_UNROLL for (int r = 0; r < kRows; ++r)
      FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<T>{};
    if (p.b.shared)
      add_product<T, true>(p, p.a, p.b.base, i, j, sum);
    else
      add_product<T, false>(p, p.a, p.b.base, i, j, sum);
    if (p.other_a) add_product<T, false>(p, p.other_a, p.other_b, i, j, sum);
    if (p.factor) {
      const Vec<T> factor = load(p.factor);
      FM_UNROLL for (int r = 0; r < kRows; ++r)
        FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] *= factor;
    }
    if (p.start.base) {
      if (p.start.shared)
        add_start<T, true>(p, i, j, sum);
      else
        add_start<T, false>(p, i, j, sum);
    }
    T* out = p.c + i * row + j * column;
    if (p.mask) {
      const T* mask = p.mask + i * row + j * column;
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += row, mask += row)
        FM_UNROLL for (int c = 0; c < kColumns; ++c)
          store(out + c * column, where_active(load(mask + c * column), sum[r][c]));
    } else if (p.relu) {
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += row)
        FM_UNROLL for (int c = 0; c < kColumns; ++c) store(out + c * column, maximum(Vec<T>{}, sum[r][c]));
    } else {
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += row)
        FM_UNROLL for (int c = 0; c < kColumns; ++c) store(out + c * column, sum[r][c]);
    }
  }
}

template <class T, int kRows = kLaneRows>
FM_INLINE void lane_panel(int64_t rows, int64_t columns, const LaneProduct<T>& p, int64_t i) {
  if (rows == kRows) {
    const int64_t whole = columns / kLaneColumns * kLaneColumns;
    lane_tiles<T, kRows, kLaneColumns>(p, i, 0, whole);
    return lane_tiles<T, kRows, 1>(p, i, whole, columns);
  }
  if constexpr (kRows > 1) lane_panel<T, kRows - 1>(rows, columns, p, i);
}

// Rows dealt out evenly among panels of A that stay in the first-level cache.
template <class T>
void multiply_lanes(int64_t rows, int64_t columns, const LaneProduct<T>& p) {
  const int64_t fitting = kLanePanelBytes / (larger(1, p.depth) * FASTMETA_VECTOR_BYTES);
  const int64_t panels = divide_up(rows, larger(4, smaller(kLaneRows, fitting)));
  for (int64_t n = 0, i = 0; n < panels; ++n) {
    const int64_t height = rows / panels + (n < rows % panels);
    lane_panel<T>(height, columns, p, i);
    i += height;
  }
}

// to = start + factor * sums of the columns of x [rows, columns]
template <class T, int kColumns>
FM_INLINE void sum_columns(int64_t rows, int64_t columns, const T* x, LaneNumbers<T> start, const T* factor, int64_t j,
                           T* to) {
  constexpr int64_t W = kWidth<T>;
  Vec<T> sum[kColumns];
  FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[c] = Vec<T>{};
  for (int64_t i = 0; i < rows; ++i)
    FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[c] += load(x + (i * columns + j + c) * W);
  FM_UNROLL for (int c = 0; c < kColumns; ++c) {
    if (factor) sum[c] *= load(factor);
    if (start.base) sum[c] += start.shared ? broadcast(start.base[j + c]) : load(start.base + (j + c) * W);
    store(to + (j + c) * W, sum[c]);
  }
}
template <class T>
void sum_columns_of_lanes(int64_t rows, int64_t columns, const T* x, LaneNumbers<T> start, const T* factor, T* to) {
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8) sum_columns<T, 8>(rows, columns, x, start, factor, j, to);
  for (; j < columns; ++j) sum_columns<T, 1>(rows, columns, x, start, factor, j, to);
}

}  // namespace fastmeta::FASTMETA_ISA
