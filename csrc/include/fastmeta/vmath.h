// Elementary functions on vectors, to one or two units in the last place. NaN in, NaN out.
#pragma once

#include <fastmeta/simd.h>
#include <math.h>

namespace fastmeta::FASTMETA_ISA {

// 2^n for n in the range of normal exponents, and the shift that brings an integer into the exponent field
FM_INLINE Vec<float> power_of_two(IntVec<float> n) { return (Vec<float>)((n + 127) << 23); }
FM_INLINE Vec<double> power_of_two(IntVec<double> n) { return (Vec<double>)((n + 1023) << 52); }

// The integer nearest to x, by adding and taking away 1.5 * 2^23 (2^52); its bits are left in the low mantissa.
template <class T>
constexpr T kRound = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);

template <class T, int N>
FM_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = broadcast(coefficients[0]);
  FM_UNROLL for (int i = 1; i < N; ++i) sum = sum * x + broadcast(coefficients[i]);
  return sum;
}

// e^r for |r| <= ln(2) / 2: Cephes' minimax polynomial, and Taylor's to the 13th power
FM_INLINE Vec<float> exp_small(Vec<float> r) {
  constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  return polynomial(r, c) * (r * r) + r + 1.0f;
}
FM_INLINE Vec<double> exp_small(Vec<double> r) {
  constexpr double c[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                          1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
  return polynomial(r, c) * (r * r) + r + 1.0;
}

template <class T>
FM_INLINE Vec<T> exponential(Vec<T> x) {
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T lowest = kFloat ? T(-104) : T(-746), highest = kFloat ? T(89) : T(710);
  x = x < lowest ? broadcast(lowest) : x;
  x = x > highest ? broadcast(highest) : x;
  const Vec<T> shifted = x * T(1.44269504088896340736) + kRound<T>;
  const Vec<T> n = shifted - kRound<T>;
  const Vec<T> r = x - n * (kFloat ? T(0.693359375) : T(6.93145751953125e-1)) -
                   n * (kFloat ? T(-2.12194440e-4) : T(1.42860682030941723212e-6));
  // two steps, so that neither leaves the exponent's range: results may be infinite or subnormal
  const IntVec<T> whole = (IntVec<T>)shifted - (IntVec<T>)broadcast(kRound<T>);
  const IntVec<T> half = whole >> 1;
  return exp_small(r) * power_of_two(half) * power_of_two(whole - half);
}

// Natural logarithm of positive normal numbers and infinity.
FM_INLINE Vec<float> logarithm(Vec<float> x) {
  IntVec<float> bits = (IntVec<float>)x;
  // mantissa into [sqrt(1/2), sqrt(2))
  IntVec<float> exponent = ((bits - 0x3f3504f3) >> 23);
  const Vec<float> m = (Vec<float>)(bits - (exponent << 23)) - 1.0f;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  constexpr float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const Vec<float> square = m * m;
  const Vec<float> y = polynomial(m, c) * m * square - e * 2.12194440e-4f - 0.5f * square;
  const Vec<float> result = m + y + e * 0.693359375f;
  return x < __builtin_inff() ? result : x;
}
FM_INLINE Vec<double> logarithm(Vec<double> x) {
  IntVec<double> bits = (IntVec<double>)x;
  IntVec<double> exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const Vec<double> f = (Vec<double>)(bits - (exponent << 52)) - 1.0;
  const Vec<double> e = __builtin_convertvector(exponent, Vec<double>);
  // log(1 + f) through s = f / (2 + f), as fdlibm
  constexpr double c[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                          2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                          6.666666666666735130e-01};
  const Vec<double> s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  const Vec<double> r = polynomial(z, c) * z;
  const Vec<double> result = e * 6.93147180369123816490e-01 - ((half - (s * (half + r) + e * 1.90821492927058770002e-10)) - f);
  return x < __builtin_inf() ? result : x;
}

template <class T>
FM_INLINE Vec<T> sigmoid(Vec<T> x) {
  return 1 / (1 + exponential<T>(-x));
}

// tanh near zero, where 1 - 2 / (e^2x + 1) would cancel (Cephes)
FM_INLINE Vec<float> tanh_small(Vec<float> x) {
  constexpr float c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                         -3.33332819422e-1f};
  const Vec<float> z = x * x;
  return polynomial(z, c) * z * x + x;
}
FM_INLINE Vec<double> tanh_small(Vec<double> x) {
  constexpr double p[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
  constexpr double q[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3};
  const Vec<double> z = x * x;
  return x + x * z * (polynomial(z, p) / polynomial(z, q));
}
template <class T>
FM_INLINE Vec<T> hyperbolic_tangent(Vec<T> x) {
  const Vec<T> size = absolute(x);
  const Vec<T> large = 1 - 2 / (exponential<T>(2 * size) + 1);
  return size < T(0.625) ? tanh_small(x) : x < 0 ? -large : large;
}

// The rest lane by lane through the C library.
FM_INLINE float scalar_erf(float x) { return erff(x); }
FM_INLINE double scalar_erf(double x) { return erf(x); }
FM_INLINE float scalar_sin(float x) { return sinf(x); }
FM_INLINE double scalar_sin(double x) { return sin(x); }
FM_INLINE float scalar_cos(float x) { return cosf(x); }
FM_INLINE double scalar_cos(double x) { return cos(x); }

#define FM_LANE_BY_LANE(name, scalar)                         \
  template <class T>                                          \
  inline void name(T* p) {                                    \
    for (int i = 0; i < kWidth<T>; ++i) p[i] = scalar(p[i]);  \
  }                                                           \
  template <class T>                                          \
  FM_INLINE Vec<T> name(Vec<T> x) {                           \
    alignas(64) T lanes[kWidth<T>];                           \
    store(lanes, x);                                          \
    name<T>(lanes);                                           \
    return load(lanes);                                       \
  }
FM_LANE_BY_LANE(error_function, scalar_erf)
FM_LANE_BY_LANE(sine, scalar_sin)
FM_LANE_BY_LANE(cosine, scalar_cos)
#undef FM_LANE_BY_LANE

}  // namespace fastmeta::FASTMETA_ISA
