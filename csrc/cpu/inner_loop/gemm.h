// Products of the few rows of one task with matrices whose rows are padded to whole vectors: no masks, no packing.
//
//   C[i, j] = start[i, j] + factor * (sum_k A[i, k] B[k, j] + other_scale * sum_k A'[i, k] B'[k, j])
//
// The second sum is there because tangents come in pairs (d(XY) = dX Y + X dY): one pass, one store. relu goes with the
// store: C = max(0, C), or 0 where `mask` is not positive and C elsewhere, at NaN too.
#pragma once

#include <fastmeta/simd.h>

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct Term {
  const T* a = nullptr;
  int64_t a_row = 0, a_step = 0;
  const T* b = nullptr;
  int64_t b_row = 0;
  int64_t depth = 0;
};

template <class T>
struct Product {
  Term<T> term, other;
  T other_scale = 1;
  T* c;
  int64_t ldc;
  const T* start;  // a row step of 0 repeats one row; may be C
  int64_t start_row;
  T factor = 1;
  bool relu = false;
  const T* mask = nullptr;  // with the row step of C
};

// Rows of a tile by its width in vectors: as many sums as leave registers for the operands.
constexpr int along_rows(int vectors) {
  return vectors == 1 ? 8 : vectors == 2 ? 6 : vectors == 3 ? 4 : vectors == 4 ? 3 : 2;
}

// ---- along: B has the columns of C ----------------------------------------------------------------------------------

template <class T, int kRows, int kVectors>
FM_INLINE void add_along(const Term<T>& t, int64_t i, int64_t j, Vec<T> (&sum)[kRows][kVectors]) {
  constexpr int W = kWidth<T>;
  const int64_t row = t.a_row, step = t.a_step, ldb = t.b_row;
  const T* a = t.a + i * row;
  const T* b = t.b + j;
  for (int64_t k = t.depth; k > 0; --k, a += step, b += ldb) {
    // the fewer operands stay, the others pass by
    if constexpr (kRows < kVectors) {
      Vec<T> left[kRows];
      FM_UNROLL for (int r = 0; r < kRows; ++r) left[r] = broadcast(a[r * row]);
      FM_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vec<T> right = load(b + v * W);
        if (kRows > 1) keep_in_register(right);
        FM_UNROLL for (int r = 0; r < kRows; ++r) sum[r][v] += left[r] * right;
      }
    } else {
      Vec<T> right[kVectors];
      FM_UNROLL for (int v = 0; v < kVectors; ++v) {
        right[v] = load(b + v * W);
        if (kRows > 1) keep_in_register(right[v]);
      }
      FM_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec<T> left = broadcast(a[r * row]);
        FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
      }
    }
  }
}

// `tiles` tiles of kRows rows each, from row i on
template <class T, int kRows, int kVectors>
__attribute__((noinline)) void along_tiles(const Product<T>& p, int64_t i, int64_t tiles, int64_t j) {
  constexpr int W = kWidth<T>;
  const Vec<T> factor = broadcast(p.factor);
  const bool two = p.other.depth > 0;
  for (const int64_t end = i + tiles * kRows; i < end; i += kRows) {
    Vec<T> sum[kRows][kVectors];
    FM_UNROLL for (int r = 0; r < kRows; ++r)
      FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
    if (two) {
      add_along<T, kRows, kVectors>(p.other, i, j, sum);
      const Vec<T> scale = broadcast(p.other_scale);
      FM_UNROLL for (int r = 0; r < kRows; ++r)
        FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] *= scale;
    }
    add_along<T, kRows, kVectors>(p.term, i, j, sum);
    const T* start = p.start + i * p.start_row + j;
    FM_UNROLL for (int r = 0; r < kRows; ++r, start += p.start_row)
      FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = load(start + v * W) + factor * sum[r][v];
    T* out = p.c + i * p.ldc + j;
    if (p.mask) {
      const T* mask = p.mask + i * p.ldc + j;
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += p.ldc, mask += p.ldc)
        FM_UNROLL for (int v = 0; v < kVectors; ++v)
          store(out + v * W, where_active(load(mask + v * W), sum[r][v]));
    } else if (p.relu) {
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += p.ldc)
        FM_UNROLL for (int v = 0; v < kVectors; ++v) store(out + v * W, maximum(Vec<T>{}, sum[r][v]));
    } else {
      FM_UNROLL for (int r = 0; r < kRows; ++r, out += p.ldc)
        FM_UNROLL for (int v = 0; v < kVectors; ++v) store(out + v * W, sum[r][v]);
    }
  }
}

template <class T, int kVectors, int kRows = along_rows(kVectors)>
FM_INLINE void along_of(int64_t rows, const Product<T>& p, int64_t i, int64_t tiles, int64_t j) {
  if (rows == kRows) return along_tiles<T, kRows, kVectors>(p, i, tiles, j);
  if constexpr (kRows > 1) along_of<T, kVectors, kRows - 1>(rows, p, i, tiles, j);
}

// Rows dealt out evenly, so that no tile is left with a single one.
template <class T, int kVectors>
void along_panel(const Product<T>& p, int64_t rows, int64_t j) {
  const int64_t tiles = divide_up(rows, along_rows(kVectors));
  if (tiles == 0) return;
  const int64_t fewer = rows / tiles, more = rows - fewer * tiles;
  if (more > 0) along_of<T, kVectors>(fewer + 1, p, 0, more, j);
  along_of<T, kVectors>(fewer, p, more * (fewer + 1), tiles - more, j);
}

// `columns` is a multiple of the vector width.
template <class T>
void multiply_along(int64_t rows, int64_t columns, const Product<T>& p) {
  constexpr int W = kWidth<T>;
  for (int64_t left = columns / W, j = 0; left > 0;) {
    const int64_t width = left == 5 || (left > 8 && left % 4 == 1) ? 5 : left == 6 ? 3 : smaller(4, left);
    if (width == 5) along_panel<T, 5>(p, rows, j);
    if (width == 4) along_panel<T, 4>(p, rows, j);
    if (width == 3) along_panel<T, 3>(p, rows, j);
    if (width == 2) along_panel<T, 2>(p, rows, j);
    if (width == 1) along_panel<T, 1>(p, rows, j);
    left -= width;
    j += width * W;
  }
}

// ---- across: the rows of B are the columns of C, sums run along vectors -----------------------------------------

#if FASTMETA_VECTOR_BYTES >= 32
FM_INLINE __m128 sums_of_four(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  const __m256 p = one_register(a), q = one_register(b), r = one_register(c), s = one_register(d);
  const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
  const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
  const __m256 z = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
}
FM_INLINE __m256d sums_of_four(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
  const __m256d p = one_register(a), q = one_register(b), r = one_register(c), s = one_register(d);
  const __m256d x = _mm256_add_pd(_mm256_unpacklo_pd(p, q), _mm256_unpackhi_pd(p, q));
  const __m256d y = _mm256_add_pd(_mm256_unpacklo_pd(r, s), _mm256_unpackhi_pd(r, s));
  return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
}
#else
template <class T>
struct FourNumbers {
  T number[4];
  T operator[](int i) const { return number[i]; }
};
template <class V>
FM_INLINE auto sums_of_four(V a, V b, V c, V d) {
  using T = __typeof__(+a[0]);
  return FourNumbers<T>{{sum_of_lanes<T>(a), sum_of_lanes<T>(b), sum_of_lanes<T>(c), sum_of_lanes<T>(d)}};
}
#endif

// the sum of one vector's lanes in few steps
template <class T>
FM_INLINE T lane_sum(Vec<T> v) {
  const auto sums = sums_of_four(v, Vec<T>{}, Vec<T>{}, Vec<T>{});
  return T(sums[0]);
}

template <class T, class V>
FM_INLINE void store_four(const Product<T>& p, const V& sums, int64_t i, int64_t j) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  const Four four = {sums[0], sums[1], sums[2], sums[3]};
  Four x = *(const Unaligned*)(p.start + i * p.start_row + j) + p.factor * four;
  if (p.relu) x = Four{} > x ? Four{} : x;
  if (p.mask) x = *(const Unaligned*)(p.mask + i * p.ldc + j) <= 0 ? Four{} : x;
  *(Unaligned*)(p.c + i * p.ldc + j) = x;
}
template <class T>
FM_INLINE void store_one(const Product<T>& p, T sum, int64_t i, int64_t j) {
  T x = p.start[i * p.start_row + j] + p.factor * sum;
  if (p.relu) x = T(0) > x ? T(0) : x;
  if (p.mask) x = p.mask[i * p.ldc + j] <= 0 ? T(0) : x;
  p.c[i * p.ldc + j] = x;
}

template <class T, int kRows, int kColumns>
FM_INLINE void add_across(const Term<T>& t, int64_t i, int64_t j, Vec<T> (&sum)[kRows][kColumns]) {
  constexpr int W = kWidth<T>;
  const T* a = t.a + i * t.a_row;
  const T* b = t.b + j * t.b_row;
  const int64_t a_row = t.a_row, b_row = t.b_row;
  for (int64_t k = 0; k < t.depth; k += W) {
    Vec<T> left[kRows];
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      left[r] = load(a + r * a_row + k);
      if (kColumns > 1) keep_in_register(left[r]);
    }
    FM_UNROLL for (int c = 0; c < kColumns; ++c) {
      Vec<T> right = load(b + c * b_row + k);
      if (kRows > 1) keep_in_register(right);
      FM_UNROLL for (int r = 0; r < kRows; ++r) sum[r][c] += left[r] * right;
    }
  }
}

// `tiles` tiles of kRows rows each, from row i on
template <class T, int kRows, int kColumns>
__attribute__((noinline)) void across_tiles(const Product<T>& p, int64_t i, int64_t tiles, int64_t j) {
  const bool two = p.other.depth > 0;
  for (const int64_t end = i + tiles * kRows; i < end; i += kRows) {
    Vec<T> sum[kRows][kColumns];
    FM_UNROLL for (int r = 0; r < kRows; ++r)
      FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<T>{};
    if (two) {
      add_across<T, kRows, kColumns>(p.other, i, j, sum);
      const Vec<T> scale = broadcast(p.other_scale);
      FM_UNROLL for (int r = 0; r < kRows; ++r)
        FM_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] *= scale;
    }
    add_across<T, kRows, kColumns>(p.term, i, j, sum);
    FM_UNROLL for (int r = 0; r < kRows; ++r)
      if constexpr (kColumns == 4) store_four(p, sums_of_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), i + r, j);
    if constexpr (kColumns == 1) {
      Vec<T> column[4] = {};
      FM_UNROLL for (int r = 0; r < kRows; ++r) column[r] = sum[r][0];
      const auto sums = sums_of_four(column[0], column[1], column[2], column[3]);
      FM_UNROLL for (int r = 0; r < kRows; ++r) store_one<T>(p, T(sums[r]), i + r, j);
    }
  }
}

template <class T, int kColumns>
void across_panel(const Product<T>& p, int64_t rows, int64_t j) {
  constexpr int most = kColumns == 4 ? 3 : 4;
  const int64_t tiles = divide_up(rows, most);
  if (tiles == 0) return;
  const int64_t fewer = rows / tiles, more = rows - fewer * tiles;
  const auto run = [&](int64_t height, int64_t i, int64_t count) {
    if constexpr (most == 4)
      if (height == 4) across_tiles<T, 4, kColumns>(p, i, count, j);
    if (height == 3) across_tiles<T, 3, kColumns>(p, i, count, j);
    if (height == 2) across_tiles<T, 2, kColumns>(p, i, count, j);
    if (height == 1) across_tiles<T, 1, kColumns>(p, i, count, j);
  };
  if (more > 0) run(fewer + 1, 0, more);
  run(fewer, more * (fewer + 1), tiles - more);
}

// `depth` of the terms is a multiple of the vector width; A and B are zero beyond their ends, at least one of them.
template <class T>
void multiply_across(int64_t rows, int64_t columns, const Product<T>& p) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) across_panel<T, 4>(p, rows, j);
  for (; j < columns; ++j) across_panel<T, 1>(p, rows, j);
}

}  // namespace fastmeta::FASTMETA_ISA
