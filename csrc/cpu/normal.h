// SPDX-License-Identifier: Apache-2.0
// The normal distribution behind the exact GELU, u P(N < u): what erf is to it, in vectors.
#pragma once
#include "simd.h"

namespace tsk::TSK_ISA {

// P(N < u) and the density at u.
template <class C>
struct Normal {
  Vec<C> cdf, density;
};

// 2^z for z <= 0, relative error below 2e-7; 0 where it underflows, and so for -inf. z = n + r with n rounded to
// nearest; the polynomial is fitted (minimax, degree 5, exact at 0, 9.2e-8) to |r| <= 1/2.
TSK_INLINE Vec<float> exp2(Vec<float> z) {
#if defined(__AVX512F__)
  Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, found in the low mantissa bits
  Vec<float> biased = z + magic, n = biased - magic;
#endif
  Vec<float> r = z - n;
  Vec<float> p = r * 1.3264726005017885e-3f + 9.67151272319154e-3f;
  p = p * r + 5.550733747219908e-2f;
  p = p * r + 2.4022242083554116e-1f;
  p = p * r + 6.931469775963963e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  p = z < -125.0f ? Vec<float>{} : p;  // -inf - -inf is NaN
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  p *= (Vec<float>)(((Mask<float>)biased - 0x4b400000 + 127) << 23);
  return z < -125.0f ? Vec<float>{} : p;
#endif
}

// 1 / d for d >= 1, rounded once more than a division; some small number for large ones.
TSK_INLINE Vec<float> reciprocal(Vec<float> d) {
#if defined(__AVX512F__)           // a division keeps the unit of the multiplications busy for 16 cycles
  d = d < 1e4f ? d : splat(1e4f);  // inf * 0 would be NaN; what is this large meets a factor of 0
  Vec<float> t = (Vec<float>)_mm512_rcp14_ps((__m512)d);
  return t + t * (1.0f - d * t);
#else
  return 1.0f / d;
#endif
}

// For a = |u|, P(N < -a) = exp(-a^2 / 2) Q(a), and Q(a) = erfcx(a / sqrt(2)) / 2 is t times a polynomial in t - 1/2,
// t = 1 / (1 + 0.35 a): degree 8, fitted (minimax of the relative error, 3.2e-8) on 0 <= a <= 13.25, beyond which the
// exponential is 0. All terms stay small, so that float32 evaluation adds no more than its rounding. Measured
// in float32 against float64 on [-13, 13]: |error of cdf| below 2e-7, mean error of u cdf 1.7e-8 (torch's
// GELU: 4.7e-8), relative error below 1.5e-6 down to u = -5, where 1 + erf(u / sqrt(2)) has one digit left.
TSK_INLINE Normal<float> normal(Vec<float> u) {
  Vec<float> a = (Vec<float>)((Mask<float>)u & 0x7fffffff), t = reciprocal(1.0f + 0.35f * a), y = t - 0.5f;
  Vec<float> p = y * -2.911211765519471e-2f + 2.7355544338321307e-2f;
  p = p * y + 4.416866663832851e-2f;
  p = p * y - 5.613454398223826e-2f;
  p = p * y - 8.174100916721375e-2f;
  p = p * y + 8.18706707695467e-2f;
  p = p * y + 2.843958193828763e-1f;
  p = p * y + 3.429916100624933e-1f;
  p = p * y + 2.532442766169951e-1f;
  Vec<float> e = exp2(u * -0.72134752f * u), tail = e * (t * p);
  return {u < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

TSK_INLINE Normal<double> normal(Vec<double> u) {
  Vec<double> cdf;
  for (int i = 0; i < kWidth<double>; ++i) cdf[i] = 0.5 * __builtin_erfc(-u[i] * 0.70710678118654752440);
  return {cdf, exp(u * u * -0.5) * 0.39894228040143267794};
}

}  // namespace tsk::TSK_ISA
