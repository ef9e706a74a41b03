// Products of one task's small matrices by one block, in the block's memory.
//
// Rows are whole numbers of four elements, and the elements beyond a matrix's last column are zero: loops over terms go
// in fours and need no tails. A thread has a tile of results in registers.
#pragma once

#include "../device.h"

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

  // The same with its last warp, or several, first.
  __device__ __forceinline__ Team turned(int by) const {
    const int other = id - by;
    return {other < 0 ? other + threads : other, threads};
  }
};

// A number that is kept where it is: those that a kernel's arguments give for a layer are fetched anew at each use, if
// the compiler is free to.
__device__ __forceinline__ int held(int i) {
#ifndef FASTMETA_HOST
  asm("" : "+r"(i));
#endif
  return i;
}
__device__ __forceinline__ unsigned held(unsigned i) { return unsigned(held(int(i))); }

__host__ __device__ __forceinline__ int whole(int n) { return (n + 3) & ~3; }

// n / by of numbers that are not negative: most often a third of a division's instructions.
__device__ __forceinline__ int divided(int n, int by) {
  if (n >= 1 << 22) return n / by;
#ifdef FASTMETA_HOST
  int q = int(float(n) / float(by));
#else
  int q = int(__fdividef(float(n), float(by)));
#endif
  const int rest = n - q * by;
  if (rest < 0) --q;
  if (rest >= by) ++q;
  return q;
}

// f(row, column) for each element, neighbouring threads on neighbouring columns.
template <class F>
__device__ __forceinline__ void each(Team team, int rows, int columns, const F& f) {
  if (columns <= 0) return;
  int r = divided(team.id, columns), c = team.id - r * columns;
  const int more_rows = divided(team.threads, columns), more_columns = team.threads - more_rows * columns;
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

// The same for what comes from far memory: kAhead are asked for before the first is used.
template <int kAhead, class V, class Get, class Put>
__device__ __forceinline__ void each_fetched(Team team, int rows, int columns, const Get& get, const Put& put) {
  if (columns <= 0) return;
  int r = divided(team.id, columns), c = team.id - r * columns;
  const int more_rows = divided(team.threads, columns), more_columns = team.threads - more_rows * columns;
  while (r < rows) {
    int at_row[kAhead], at_column[kAhead];
    V value[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      at_row[u] = r;
      at_column[u] = c;
      if (r < rows) value[u] = get(r, c);
      r += more_rows;
      c += more_columns;
      if (c >= columns) {
        c -= columns;
        ++r;
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at_row[u] < rows) put(at_row[u], at_column[u], value[u]);
  }
}

// f(i) for i = 0, 4, 8 ... below count
template <class F>
__device__ __forceinline__ void each_quad(Team team, int count, const F& f) {
  for (int i = 4 * team.id; i < count; i += 4 * team.threads) f(i);
}

// Memory from some place on, like a pointer. kShared: all of it is the block's shared memory, where an address is a
// number of half the size.
template <class A, bool kShared>
struct Field {
  A* at = nullptr;
  __device__ __forceinline__ Field() {}
  __device__ __forceinline__ explicit Field(A* p) : at(p) {}
  __device__ __forceinline__ A& operator[](int i) const { return at[i]; }
  __device__ __forceinline__ Field operator+(int i) const { return Field(at + i); }
};
#ifndef FASTMETA_HOST
template <class A>
struct Field<A, true> {
  unsigned at = 0;  // bytes
  __device__ __forceinline__ Field() {}
  __device__ __forceinline__ explicit Field(A* p) {
    FM_DYNAMIC_SHARED(shared);
    at = unsigned(reinterpret_cast<unsigned char*>(p) - shared);
  }
  __device__ __forceinline__ A& operator[](int i) const {
    FM_DYNAMIC_SHARED(shared);
    return *reinterpret_cast<A*>(shared + (at + unsigned(i) * unsigned(sizeof(A))));
  }
  __device__ __forceinline__ Field operator+(int i) const {
    Field f;
    f.at = at + unsigned(i) * unsigned(sizeof(A));
    return f;
  }
};
#endif
template <class A, bool kShared>
__device__ __forceinline__ Field<A, kShared> held(Field<A, kShared> f) {
#ifndef FASTMETA_HOST
  if constexpr (kShared) f.at = held(f.at);
#endif
  return f;
}
template <class A, bool kShared>
__device__ __forceinline__ Quad<A> quad(Field<A, kShared> f) {
  return quad(&f[0]);
}
template <class A, bool kShared>
__device__ __forceinline__ void put_quad(Field<A, kShared> f, const Quad<A>& q) {
  put_quad(&f[0], q);
}

// Both sides of a product, or none.
template <class A, bool kShared>
struct Term {
  Field<A, kShared> a;
  int lda = 0;
  Field<A, kShared> b;
  int ldb = 0;

  __device__ __forceinline__ bool is_given() const { return ldb != 0; }
};

constexpr int kTileRows = 2;  // 1 where there are threads for it

// One result for each thread at a time, where there are no more: few columns share a tile badly.
template <class A, bool kShared, class Out>
__device__ __forceinline__ void rows_by_few_rows(Team team, int rows, int columns, int written, int depth,
                                                 const Term<A, kShared>& first, const Term<A, kShared>& second, A scale,
                                                 const Out& out) {
  const int across = whole(written), count = rows * across;
  for (int i = team.id; i < count; i += team.threads) {
    const int row = divided(i, across), column = i - row * across;
    A sum = 0;
    const auto add = [&](const Term<A, kShared>& t) {
      Field<A, kShared> a = held(t.a + row * t.lda), b = held(t.b + column * t.ldb);
      A part[2] = {};
#pragma unroll kShared ? 2 : 1
      for (int k = 0; k < depth; k += 4) {
        const Quad<A> x = quad(a), y = quad(b);
        a = a + 4;
        b = b + 4;
#pragma unroll
        for (int d = 0; d < 4; ++d) part[d % 2] += x.v[d] * y.v[d];
      }
      sum += part[0] + part[1];
    };
    if (column < columns) {
      if (second.is_given()) add(second);
      sum *= scale;
      if (first.is_given()) add(first);
    }
    out(row, column, sum);
  }
}

template <int kRows, class A, bool kShared, class Out>
__device__ __forceinline__ void tiles_of_rows_by_rows(Team team, int rows, int columns, int written, int depth,
                                                      const Term<A, kShared>& first, const Term<A, kShared>& second,
                                                      A scale, const Out& out) {
  const int across = divide_up(written, 4), down = divide_up(rows, kRows), tiles = down * across;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    // neighbouring threads have neighbouring rows, which start in different banks
    const int tx = divided(tile, down), ty = tile - tx * down;
    A sum[kRows][4] = {};
    const auto add = [&](const Term<A, kShared>& t) {
      Field<A, kShared> a[kRows], b[4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = held(t.a + smaller(ty + i * down, rows - 1) * t.lda);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = held(t.b + smaller(tx + j * across, columns - 1) * t.ldb);
#pragma unroll 1  // two take more registers than there are
      for (int k = 0; k < depth; k += 4) {
        Quad<A> x[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          x[i] = quad(a[i]);
          a[i] = a[i] + 4;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Quad<A> y = quad(b[j]);
          b[j] = b[j] + 4;
#pragma unroll
          for (int d = 0; d < 4; ++d) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) sum[i][j] += x[i].v[d] * y.v[d];
          }
        }
      }
    };
    if (second.is_given()) {
      add(second);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] *= scale;
      }
    }
    if (first.is_given()) add(first);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = ty + i * down;
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) out(row, tx + j * across, sum[i][j]);
    }
  }
}

// out(i, j, sum over k of a[i, k] b[j, k]): `first` plus `scale` times `second`. Columns up to a whole number of four
// from `written` on are handed out; beyond `columns` they mean nothing.
template <class A, bool kShared, class Out>
__device__ __forceinline__ void rows_by_rows(Team team, int rows, int columns, int written, int depth,
                                             const Term<A, kShared>& first, const Term<A, kShared>& second, A scale,
                                             const Out& out) {
  if (columns == 0 || rows * written <= 2 * team.threads)
    rows_by_few_rows<A, kShared>(team, rows, columns, written, depth, first, second, scale, out);
  else if (kShared && rows * written <= 4 * team.threads)
    tiles_of_rows_by_rows<1, A, kShared>(team, rows, columns, written, depth, first, second, scale, out);
  else
    tiles_of_rows_by_rows<kTileRows, A, kShared>(team, rows, columns, written, depth, first, second, scale, out);
}

template <int kRows, class A, bool kShared, class Out>
__device__ __forceinline__ void tiles_of_rows_by_matrix(Team team, int rows, int written, int depth,
                                                        const Term<A, kShared>& first, const Term<A, kShared>& second,
                                                        A scale, const Out& out) {
  const int across = divide_up(written, 4), tiles = divide_up(rows, kRows) * across;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    const int ty = divided(tile, across), tx = tile - ty * across;
    Quad<A> sum[kRows] = {};
    const auto add = [&](const Term<A, kShared>& t) {
      Field<A, kShared> b = held(t.b + 4 * tx);
      Field<A, kShared> a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = held(t.a + smaller(kRows * ty + i, rows - 1) * t.lda);
      const int down = held(t.ldb);
#pragma unroll kShared ? 2 : 1
      for (int k = 0; k < depth; k += 4) {
        Quad<A> x[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          x[i] = quad(a[i]);
          a[i] = a[i] + 4;
        }
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const Quad<A> y = quad(b);
          b = b + down;
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i].v[j] += x[i].v[d] * y.v[j];
          }
        }
      }
    };
    if (second.is_given()) {
      add(second);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i].v[j] *= scale;
      }
    }
    add(first);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = kRows * ty + i;
      if (row < rows) out(row, 4 * tx, sum[i]);
    }
  }
}

// out(i, j, four sums over k of a[i, k] b[k, j + 0 .. 3]), with `first`, `second` and `written` as above. b has rows
// of zeros up to a whole number of four.
template <class A, bool kShared, class Out>
__device__ __forceinline__ void rows_by_matrix(Team team, int rows, int written, int depth,
                                               const Term<A, kShared>& first, const Term<A, kShared>& second, A scale,
                                               const Out& out) {
  if (kShared && rows * written <= 4 * team.threads)
    tiles_of_rows_by_matrix<1, A, kShared>(team, rows, written, depth, first, second, scale, out);
  else
    tiles_of_rows_by_matrix<kTileRows, A, kShared>(team, rows, written, depth, first, second, scale, out);
}

// out(i, j, four sums over k of a[k, i] b[k, j + 0 .. 3]): of `first` and `second`
template <class A, bool kShared, class Out>
__device__ __forceinline__ void sums_over_rows(Team team, int rows, int columns, int depth,
                                               const Term<A, kShared>& first, const Term<A, kShared>& second,
                                               const Out& out) {
  const int across = divide_up(columns, 4), tiles = divide_up(rows, 4) * across;
  for (int tile = team.id; tile < tiles; tile += team.threads) {
    const int ty = divided(tile, across), tx = tile - ty * across;
    Quad<A> sum[4] = {};
    const auto add = [&](const Term<A, kShared>& t) {
      Field<A, kShared> a = held(t.a + 4 * ty), b = held(t.b + 4 * tx);
      const int a_down = held(t.lda), b_down = held(t.ldb);
#pragma unroll kShared ? 2 : 1
      for (int k = 0; k < depth; ++k) {
        const Quad<A> x = quad(a), y = quad(b);
        a = a + a_down;
        b = b + b_down;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i].v[j] += x.v[i] * y.v[j];
        }
      }
    };
    add(first);
    if (second.is_given()) add(second);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * ty + i < rows) out(4 * ty + i, 4 * tx, sum[i]);
  }
}

}  // namespace fastmeta::cuda
