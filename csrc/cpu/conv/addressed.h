// Matrix products whose left factor is found by addresses:
//
//   C[i, j] = start[j] + sum_k A[row[i] + step[k]] B[k, j]
//
// A convolution is one, with output pixels as rows and taps and channels as steps; the gradient of its weight is
// another, with the same two tables in exchanged roles. No matrix of shifted images is ever written.
#pragma once

#include <fastmeta/gemm.h>

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct Addressed {
  const T* a;
  const int32_t* row;
  int64_t rows;
  const int32_t* step;
  int64_t depth;
  Right<T> b;  // as it stands: of whole vectors
  int64_t columns;
  T* c;
  const int32_t* c_row;  // where row i of C starts
  const T* start;        // of whole vectors
  bool add;              // C += instead of C = start +
};

// Panels of two vectors and this depth are well within a first-level cache.
template <class T>
constexpr int64_t kAddressedDepth = 20480 / (2 * FASTMETA_VECTOR_BYTES);

template <class T>
struct AddressedTile {
  const T* a;
  const int32_t* step;
  int64_t depth;
  const T* b;
  int64_t ldb;
  T* c;
  const T* start;  // null: C itself
  int64_t last;    // columns in the last vector
};

template <class T, int kRows, int kVectors>
void addressed_tile(const AddressedTile<T>& t, const int32_t* row, const int32_t* c_row) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[kRows][kVectors];
  FM_UNROLL for (int r = 0; r < kRows; ++r)
    FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  const T* a[kRows];
  FM_UNROLL for (int r = 0; r < kRows; ++r) a[r] = t.a + row[r];
  const T* b = t.b;
  const int64_t ldb = t.ldb;
  for (const int32_t *step = t.step, *end = step + t.depth; step != end; ++step, b += ldb) {
    const int64_t k = *step;
    Vec<T> right[kVectors];
    FM_UNROLL for (int v = 0; v < kVectors; ++v) {
      right[v] = load(b + v * W);
      if (kRows > 1) keep_in_register(right[v]);
    }
    FM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast(a[r][k]);
      FM_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  const int64_t last = t.last;
  FM_UNROLL for (int r = 0; r < kRows; ++r) {
    T* out = t.c + c_row[r];
    const T* start = t.start ? t.start : out;
    if (last == W) {
      FM_UNROLL for (int v = 0; v < kVectors; ++v) store(out + v * W, load(start + v * W) + sum[r][v]);
    } else {
      FM_UNROLL for (int v = 0; v < kVectors - 1; ++v) store(out + v * W, load(start + v * W) + sum[r][v]);
      constexpr int v = kVectors - 1;
      store_first(out + v * W, load_first(start + v * W, last) + sum[r][v], last);
    }
  }
}

template <class T>
using AddressedTileFunction = void (*)(const AddressedTile<T>&, const int32_t*, const int32_t*);

// by number of rows, 1 to 8
template <class T, int kVectors>
inline constexpr AddressedTileFunction<T> kAddressedTiles[8] = {
    addressed_tile<T, 1, kVectors>,
    addressed_tile<T, 2, kVectors>,
    addressed_tile<T, 3, kVectors>,
    addressed_tile<T, 4, kVectors>,
    addressed_tile<T, panel_rows(kVectors) >= 5 ? 5 : 1, kVectors>,
    addressed_tile<T, panel_rows(kVectors) >= 6 ? 6 : 1, kVectors>,
    addressed_tile<T, panel_rows(kVectors) >= 7 ? 7 : 1, kVectors>,
    addressed_tile<T, panel_rows(kVectors) >= 8 ? 8 : 1, kVectors>,
};

// Rows dealt out evenly, so that no tile is left with a single one.
template <class T, int kVectors>
void addressed_panel(const Addressed<T>& p, const AddressedTile<T>& t) {
  for (int64_t tiles = divide_up(p.rows, panel_rows(kVectors)), i = 0; tiles > 0; --tiles) {
    const int64_t here = divide_up(p.rows - i, tiles);
    kAddressedTiles<T, kVectors>[here - 1](t, p.row + i, p.c_row + i);
    i += here;
  }
}

template <class T>
void multiply_addressed(const Addressed<T>& p) {
  constexpr int W = kWidth<T>;
  const int64_t vectors = divide_up(p.columns, W);
  const int64_t blocks = larger(1, divide_up(p.depth, kAddressedDepth<T>));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = p.depth * block / blocks, end = p.depth * (block + 1) / blocks;
    for (int64_t v = 0, width; v < vectors; v += width) {
      width = panel_vectors(vectors - v);
      const int64_t ldb = p.b.depth ? width * W : p.b.ld;
      AddressedTile<T> t{p.a, p.step + k, end - k, p.b.data + (p.b.depth ? v * W * p.b.depth : v * W) + k * ldb, ldb,
                         p.c + v * W, p.add || block > 0 ? nullptr : p.start + v * W,
                         v + width == vectors ? p.columns - (vectors - 1) * W : W};
      if (width == 1) addressed_panel<T, 1>(p, t);
      if (width == 2) addressed_panel<T, 2>(p, t);
      if (width == 3) addressed_panel<T, 3>(p, t);
    }
  }
}

}  // namespace fastmeta::FASTMETA_ISA
