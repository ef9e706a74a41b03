// Vectors of the width of one instruction set, on GCC vector extensions: loads, tails, selection, transposition.
//
// Included by csrc/cpu/isa_*.cpp, each of which names its namespace (FASTMETA_ISA) and its width
// (FASTMETA_VECTOR_BYTES) first. Kernel headers call nothing of the standard library but C functions: an inline
// function of it, compiled here for AVX, might be the copy that the linker keeps for everybody.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(FASTMETA_ISA) || !defined(FASTMETA_VECTOR_BYTES)
#error "simd.h is for the csrc/cpu/isa_*.cpp files, which choose the instruction set"
#endif

#define FM_INLINE inline __attribute__((always_inline))
#define FM_UNROLL _Pragma("GCC unroll 16")

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Value __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Integer __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef int32_t Lane;
};

template <>
struct Simd<double> {
  typedef double Value __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Integer __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef int64_t Lane;
};

template <class T>
using Vec = typename Simd<T>::Value;
template <class T>
using IntVec = typename Simd<T>::Integer;
template <class T>
using Lane = typename Simd<T>::Lane;
template <class T>
constexpr int kWidth = FASTMETA_VECTOR_BYTES / int(sizeof(T));

FM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
FM_INLINE int64_t padded(int64_t n) {
  return divide_up(n, kWidth<T>) * kWidth<T>;
}

template <class T>
FM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
FM_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
// x - 0 is x for every x, signed zeros and NaN too, so that this compiles to one broadcast
template <class T>
FM_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
FM_INLINE IntVec<T> broadcast_integer(Lane<T> x) {
  return x - IntVec<T>{};
}

// The first n lanes, 0 <= n <= width; the others are zero, and their memory is not touched.
template <class T>
FM_INLINE Vec<T> load_first(const T* p, int64_t n);
template <class T>
FM_INLINE void store_first(T* p, Vec<T> v, int64_t n);

#if FASTMETA_VECTOR_BYTES == 64
template <>
FM_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
FM_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
template <>
FM_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
template <>
FM_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
FM_INLINE Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
FM_INLINE Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }
#elif FASTMETA_VECTOR_BYTES == 32
// eight ones, then eight zeros: a mask of n lanes starts 8 - n into it
alignas(64) inline constexpr int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) inline constexpr int64_t kMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
template <>
FM_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(kMask32 + 8 - n)));
}
template <>
FM_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i*)(kMask64 + 4 - n)));
}
// masked stores are microcoded on AMD: halves and quarters are faster
template <>
FM_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  if (n >= 8) return store(p, v);
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
template <>
FM_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  if (n >= 4) return store(p, v);
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1);
    p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}
FM_INLINE Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
FM_INLINE Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
#else
template <class T>
FM_INLINE Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v = {};
  memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}
template <class T>
FM_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  memcpy(p, &v, size_t(n) * sizeof(T));
}
#if defined(__x86_64__)
FM_INLINE Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm_sqrt_ps((__m128)v); }
FM_INLINE Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm_sqrt_pd((__m128d)v); }
#else
template <class V>
FM_INLINE V square_root(V v) {
  FM_UNROLL for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif
#endif

// Keeps a vector that several rows multiply in its register: compilers like to read it again for each, and loads are
// what these loops would then wait for.
template <class V>
FM_INLINE void keep_in_register(V& v) {
#if FASTMETA_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

template <class V>
FM_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FM_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
// What goes back through relu: as in torch, NaN is active.
template <class V>
FM_INLINE V where_active(V value, V v) {
  return value <= 0 ? V{} : v;
}
FM_INLINE Vec<float> absolute(Vec<float> v) { return (Vec<float>)((IntVec<float>)v & 0x7fffffff); }
FM_INLINE Vec<double> absolute(Vec<double> v) {
  return (Vec<double>)((IntVec<double>)v & int64_t(0x7fffffffffffffff));
}
// Lanes in pairs, so that no sum waits for more than a few others.
template <class T>
FM_INLINE T sum_of_lanes(Vec<T> v) {
  alignas(64) T lanes[kWidth<T>];
  store(lanes, v);
  FM_UNROLL for (int n = kWidth<T> / 2; n > 0; n /= 2)
    FM_UNROLL for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}
#if FASTMETA_VECTOR_BYTES >= 32
// A vector's two halves added up where it takes two registers of AVX2. The masked forms: GCC takes what the plain ones
// leave undefined for a use of it.
FM_INLINE __m256 one_register(Vec<float> v) {
#if FASTMETA_VECTOR_BYTES == 64
  const __m512 x = (__m512)v;
  return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, x, 0), _mm512_maskz_extractf32x8_ps(0xff, x, 1));
#else
  return (__m256)v;
#endif
}
FM_INLINE __m256d one_register(Vec<double> v) {
#if FASTMETA_VECTOR_BYTES == 64
  const __m512d x = (__m512d)v;
  return _mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, x, 0), _mm512_maskz_extractf64x4_pd(0xf, x, 1));
#else
  return (__m256d)v;
#endif
}
template <>
FM_INLINE float sum_of_lanes<float>(Vec<float> v) {
  const __m256 half = one_register(v);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
template <>
FM_INLINE double sum_of_lanes<double>(Vec<double> v) {
  const __m256d half = one_register(v);
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
#endif

// Whether every lane of the result of a comparison is set.
template <class Mask>
FM_INLINE bool all_lanes(Mask m) {
#if FASTMETA_VECTOR_BYTES == 64
  return _mm512_cmpneq_epi32_mask((__m512i)m, _mm512_setzero_si512()) == 0xffff;
#elif FASTMETA_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)m) == -1;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)m) == 0xffff;
#else
  bool all = true;
  for (unsigned i = 0; i < sizeof(m) / sizeof(m[0]); ++i) all = all && m[i] != 0;
  return all;
#endif
}

// Square blocks that the registers transpose at once.
template <class T>
constexpr int kBlock = FASTMETA_VECTOR_BYTES >= 32 ? 32 / int(sizeof(T)) : 4;

template <class T>
FM_INLINE void transpose_block(const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  FM_UNROLL for (int i = 0; i < kBlock<T>; ++i)
    FM_UNROLL for (int j = 0; j < kBlock<T>; ++j) to[j * ld_to + i] = from[i * ld_from + j];
}

#if FASTMETA_VECTOR_BYTES >= 32
template <>
FM_INLINE void transpose_block(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 r[8], s[8];
  // two half rows per register first: half of the shuffles become loads
  FM_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * ld_from)),
                                _mm_loadu_ps(from + (i + 4) * ld_from), 1);
    r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * ld_from + 4)),
                                    _mm_loadu_ps(from + (i + 4) * ld_from + 4), 1);
  }
  FM_UNROLL for (int h = 0; h < 8; h += 4) {
    s[h] = _mm256_unpacklo_ps(r[h], r[h + 1]);
    s[h + 1] = _mm256_unpackhi_ps(r[h], r[h + 1]);
    s[h + 2] = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
    s[h + 3] = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
    _mm256_storeu_ps(to + (h + 0) * ld_to, _mm256_shuffle_ps(s[h], s[h + 2], 0x44));
    _mm256_storeu_ps(to + (h + 1) * ld_to, _mm256_shuffle_ps(s[h], s[h + 2], 0xee));
    _mm256_storeu_ps(to + (h + 2) * ld_to, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0x44));
    _mm256_storeu_ps(to + (h + 3) * ld_to, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0xee));
  }
}
template <>
FM_INLINE void transpose_block(const double* from, int64_t ld_from, double* to, int64_t ld_to) {
  __m256d r[4];
  FM_UNROLL for (int i = 0; i < 2; ++i) {
    r[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(from + i * ld_from)),
                                _mm_loadu_pd(from + (i + 2) * ld_from), 1);
    r[i + 2] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(from + i * ld_from + 2)),
                                    _mm_loadu_pd(from + (i + 2) * ld_from + 2), 1);
  }
  FM_UNROLL for (int h = 0; h < 4; h += 2) {
    _mm256_storeu_pd(to + h * ld_to, _mm256_unpacklo_pd(r[h], r[h + 1]));
    _mm256_storeu_pd(to + (h + 1) * ld_to, _mm256_unpackhi_pd(r[h], r[h + 1]));
  }
}
#endif

// to[column, row] = from[row, column]; columns of `to` from `rows` up to `rows_padded` become zero.
template <class T>
inline void transpose(int64_t rows, int64_t columns, const T* from, int64_t ld_from, T* to, int64_t ld_to,
                      int64_t rows_padded) {
  constexpr int B = kBlock<T>;
  const int64_t whole_rows = rows / B * B, whole_columns = columns / B * B;
  for (int64_t i = 0; i < whole_rows; i += B) {
    for (int64_t j = 0; j < whole_columns; j += B) {
      // short rows start a new stream each, too short for the hardware to foresee the next block of rows
      if (j % (64 / int64_t(sizeof(T))) == 0 && i + B < whole_rows)
        FM_UNROLL for (int r = 0; r < B; ++r) __builtin_prefetch(from + (i + B + r) * ld_from + j);
      transpose_block<T>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
    }
    for (int64_t j = whole_columns; j < columns; ++j)
      for (int r = 0; r < B; ++r) to[j * ld_to + i + r] = from[(i + r) * ld_from + j];
  }
  for (int64_t j = 0; j < columns; ++j) {
    T* out = to + j * ld_to;
    for (int64_t i = whole_rows; i < rows; ++i) out[i] = from[i * ld_from + j];
    for (int64_t i = rows; i < rows_padded; ++i) out[i] = 0;
  }
}

template <class T>
inline void fill_zero(T* p, int64_t n) {
  if (n > 0) memset(p, 0, size_t(n) * sizeof(T));
}

template <class T>
T sum_of_row(const T* p, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> sum = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) sum += load(p + j);
  if (j < n) sum += load_first(p + j, n - j);
  return sum_of_lanes<T>(sum);
}

}  // namespace fastmeta::FASTMETA_ISA
