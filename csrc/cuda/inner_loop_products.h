// Products of one task's small matrices by one block, in the block's memory.
//
// Rows are whole numbers of four elements, and the elements beyond a matrix's last column are zero: loops over terms go
// in fours and need no tails. A thread has a tile of results in registers.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

template <class A>
struct alignas(16) Quad {
  A v[4];
};
template <class A>
__device__ __forceinline__ Quad<A> quad(const A* from) {
  return *reinterpret_cast<const Quad<A>*>(from);
}
template <class A>
__device__ __forceinline__ void put_quad(A* to, const Quad<A>& q) {
  *reinterpret_cast<Quad<A>*>(to) = q;
}

struct Team {
  int id, threads;
};

// f(row, column) for each element, neighbouring threads on neighbouring columns.
template <class F>
__device__ __forceinline__ void each(Team team, int rows, int columns, const F& f) {
  if (columns <= 0) return;
  int r = team.id / columns, c = team.id - r * columns;
  const int more_rows = team.threads / columns, more_columns = team.threads - more_rows * columns;
  while (r < rows) {
    f(r, c);
    r += more_rows;
    c += more_columns;
    if (c >= columns) {
      c -= columns;
      ++r;
    }
  }
}

// The same for what comes from far memory: four elements are asked for before the first is used.
template <class A, class Get, class Put>
__device__ __forceinline__ void each_fetched(Team team, int rows, int columns, const Get& get, const Put& put) {
  if (columns <= 0) return;
  int r = team.id / columns, c = team.id - r * columns;
  const int more_rows = team.threads / columns, more_columns = team.threads - more_rows * columns;
  while (r < rows) {
    int at_row[4], at_column[4];
    A value[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      at_row[u] = r;
      at_column[u] = c;
      value[u] = r < rows ? get(r, c) : A(0);
      r += more_rows;
      c += more_columns;
      if (c >= columns) {
        c -= columns;
        ++r;
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at_row[u] < rows) put(at_row[u], at_column[u], value[u]);
  }
}

// f(i) for i = 0, 4, 8 ... below count
template <class F>
__device__ __forceinline__ void each_quad(Team team, int count, const F& f) {
  for (int i = 4 * team.id; i < count; i += 4 * team.threads) f(i);
}

// Both sides of a product; a is nullptr where there is none.
template <class A>
struct Term {
  const A* a = nullptr;
  int lda = 0;
  const A* b = nullptr;
  int ldb = 0;
};

constexpr int kTileRows = 2;

// out(i, j, sum over k of a[i, k] b[j, k]): `first` plus `scale` times `second`. Columns up to a whole number of four
// from `written` on are handed out; beyond `columns` they mean nothing.
template <class A, class Out>
__device__ __forceinline__ void rows_by_rows(Team team, int rows, int columns, int written, int depth,
                                             const Term<A>& first, const Term<A>& second, A scale, const Out& out) {
  const int across = divide_up(written, 4), tiles = divide_up(rows, kTileRows) * across;
  if (columns <= 0) depth = 0;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    const int ty = tile / across, tx = tile - ty * across;
    A sum[kTileRows][4] = {};
    const auto add = [&](const Term<A>& t) {
      const A *a[kTileRows], *b[4];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) a[i] = t.a + smaller(kTileRows * ty + i, rows - 1) * t.lda;
      // neighbouring threads have neighbouring columns: rows of b that start in different banks
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = t.b + (columns > 0 ? smaller(tx + j * across, columns - 1) : 0) * t.ldb;
#pragma unroll 1
      for (int k = 0; k < depth; k += 4) {
        Quad<A> x[kTileRows];
#pragma unroll
        for (int i = 0; i < kTileRows; ++i) x[i] = quad(a[i] + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Quad<A> y = quad(b[j] + k);
#pragma unroll
          for (int d = 0; d < 4; ++d) {
#pragma unroll
            for (int i = 0; i < kTileRows; ++i) sum[i][j] += x[i].v[d] * y.v[d];
          }
        }
      }
    };
    if (second.a) {
      add(second);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] *= scale;
      }
    }
    if (first.a) add(first);
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      const int row = kTileRows * ty + i;
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) out(row, tx + j * across, sum[i][j]);
    }
  }
}

// out(i, j, four sums over k of a[i, k] b[k, j + 0 .. 3]), with `first`, `second` and `written` as above. b has rows
// of zeros up to a whole number of four.
template <class A, class Out>
__device__ __forceinline__ void rows_by_matrix(Team team, int rows, int written, int depth, const Term<A>& first,
                                               const Term<A>& second, A scale, const Out& out) {
  const int across = divide_up(written, 4), tiles = divide_up(rows, kTileRows) * across;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    const int ty = tile / across, tx = tile - ty * across;
    Quad<A> sum[kTileRows] = {};
    const auto add = [&](const Term<A>& t) {
      const A* a[kTileRows];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) a[i] = t.a + smaller(kTileRows * ty + i, rows - 1) * t.lda;
      const A* b = t.b + 4 * tx;
#pragma unroll 1
      for (int k = 0; k < depth; k += 4) {
        Quad<A> x[kTileRows];
#pragma unroll
        for (int i = 0; i < kTileRows; ++i) x[i] = quad(a[i] + k);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const Quad<A> y = quad(b);
          b += t.ldb;
#pragma unroll
          for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i].v[j] += x[i].v[d] * y.v[j];
          }
        }
      }
    };
    if (second.a) {
      add(second);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i].v[j] *= scale;
      }
    }
    add(first);
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      const int row = kTileRows * ty + i;
      if (row < rows) out(row, 4 * tx, sum[i]);
    }
  }
}

// out(i, j, four sums over k of a[k, i] b[k, j + 0 .. 3]): of `first` and `second`
template <class A, class Out>
__device__ __forceinline__ void sums_over_rows(Team team, int rows, int columns, int depth, const Term<A>& first,
                                               const Term<A>& second, const Out& out) {
  const int across = divide_up(columns, 4), tiles = divide_up(rows, 4) * across;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    const int ty = tile / across, tx = tile - ty * across;
    Quad<A> sum[4] = {};
    const auto add = [&](const Term<A>& t) {
      const A *a = t.a + 4 * ty, *b = t.b + 4 * tx;
#pragma unroll 2
      for (int k = 0; k < depth; ++k) {
        const Quad<A> x = quad(a), y = quad(b);
        a += t.lda;
        b += t.ldb;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i].v[j] += x.v[i] * y.v[j];
        }
      }
    };
    add(first);
    if (second.a) add(second);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * ty + i < rows) out(4 * ty + i, 4 * tx, sum[i]);
  }
}

}  // namespace fastmeta::cuda
