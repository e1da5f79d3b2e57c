// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set this translation unit is compiled for, and the few operations attention needs.
//
// GCC vector extensions carry the arithmetic (g++ and clang++ contract a*b + c to FMA), intrinsics only the conversions
// of 16-bit types. No standard-library templates: an inline function compiled with -mavx512f could be the copy that the
// linker keeps for everybody. For the same reason all code here lives in a namespace named after the instruction set.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own avx512fintrin.h (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#define TSK_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define TSK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TSK_VECTOR_BYTES 32
#else
#define TSK_VECTOR_BYTES 16
#endif

namespace tsk::TSK_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float V __attribute__((vector_size(TSK_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(TSK_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double V __attribute__((vector_size(TSK_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(TSK_VECTOR_BYTES)));
};
template <class C>
using Vec = typename VecOf<C>::V;
template <class C>
using Mask = typename VecOf<C>::I;
template <class C>
constexpr int kWidth = TSK_VECTOR_BYTES / int(sizeof(C));

// Arithmetic type of a storage type: 16-bit types are stored, never computed with.
template <class T>
struct ComputeOf {
  typedef float C;
};
template <>
struct ComputeOf<double> {
  typedef double C;
};
template <class T>
using Compute = typename ComputeOf<T>::C;

template <class C>
TSK_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};  // which is x, and so no instruction; 0 + x is not where x is -0
}
template <class C>
TSK_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
TSK_INLINE void store(C* p, Vec<C> v) {
  memcpy(p, &v, sizeof v);
}

// --- conversions ----------------------------------------------------------------------------------------------------

TSK_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
TSK_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

TSK_INLINE float to_compute(float x) { return x; }
TSK_INLINE double to_compute(double x) { return x; }
TSK_INLINE float to_compute(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
TSK_INLINE float to_compute(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // Scaling by 2^112 moves the exponent bias and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

TSK_INLINE void from_compute(float& y, float x) { y = x; }
TSK_INLINE void from_compute(double& y, double x) { y = x; }
TSK_INLINE void from_compute(BFloat16& y, float x) {  // round to nearest, ties to even
  uint32_t u = float_to_bits(x);
  y.bits = uint16_t(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
TSK_INLINE void from_compute(Half& y, float x) {
  uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    y.bits = uint16_t(sign | 0x7e00);
  } else if (u >= 0x477ff000) {  // rounds to 65536 or more
    y.bits = uint16_t(sign | 0x7c00);
  } else if (u < 0x38800000) {  // subnormal: adding 0.5 lets the float unit round at bit 2^-24
    y.bits = uint16_t(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000));
  } else {
    y.bits = uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  }
}

// Whole vectors. The generic form is right for every type; the overloads below are the same thing in fewer
// instructions.
template <class T>
TSK_INLINE Vec<Compute<T>> load_as(const T* p) {
  Vec<Compute<T>> v;
  for (int i = 0; i < kWidth<Compute<T>>; ++i) v[i] = to_compute(p[i]);
  return v;
}
template <class T>
TSK_INLINE void store_as(T* p, Vec<Compute<T>> v) {
  for (int i = 0; i < kWidth<Compute<T>>; ++i) from_compute(p[i], Compute<T>(v[i]));
}
template <>
TSK_INLINE Vec<float> load_as(const float* p) {
  return load(p);
}
template <>
TSK_INLINE Vec<double> load_as(const double* p) {
  return load(p);
}
template <>
TSK_INLINE void store_as(float* p, Vec<float> v) {
  store(p, v);
}
template <>
TSK_INLINE void store_as(double* p, Vec<double> v) {
  store(p, v);
}

#if defined(__AVX512F__)
template <>
TSK_INLINE Vec<float> load_as(const BFloat16* p) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
template <>
TSK_INLINE Vec<float> load_as(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
template <>
TSK_INLINE void store_as(Half* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <>
TSK_INLINE void store_as(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0))));
#endif
}
#elif defined(__AVX2__)
template <>
TSK_INLINE Vec<float> load_as(const BFloat16* p) {
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
template <>
TSK_INLINE Vec<float> load_as(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
template <>
TSK_INLINE void store_as(Half* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
template <>
TSK_INLINE void store_as(BFloat16* p, Vec<float> v) {
  __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  r = (__m256i)_mm256_blendv_ps((__m256)r, (__m256)_mm256_set1_epi32(0x7fc0), nan);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
#endif

// --- reductions and lanes -------------------------------------------------------------------------------------------

template <class C>
TSK_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}
template <class C>
TSK_INLINE C hmax(Vec<C> v) {
  C m = v[0];
  for (int i = 1; i < kWidth<C>; ++i) m = v[i] > m ? C(v[i]) : m;
  return m;
}
template <class C>
TSK_INLINE C hsum(Vec<C> v) {
  C s = v[0];
  for (int i = 1; i < kWidth<C>; ++i) s += v[i];
  return s;
}
#if defined(__AVX512F__)  // halves, not one lane after the other: a row of attention waits for both
template <>
TSK_INLINE float hmax<float>(Vec<float> v) {
  return _mm512_reduce_max_ps((__m512)v);
}
template <>
TSK_INLINE float hsum<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
#endif
// `v` with the lanes from n on replaced by `x`.
template <class C>
TSK_INLINE Vec<C> keep_below(Vec<C> v, int64_t n, C x) {
  for (int i = 0; i < kWidth<C>; ++i) v[i] = i < n ? v[i] : x;
  return v;
}

// Lanes of v, or of a and then b, in the order of a constant index.
#if defined(__clang__)
template <class C>
TSK_INLINE Vec<C> shuffle(Vec<C> v, Mask<C> index) {
  Vec<C> r;
  for (int i = 0; i < kWidth<C>; ++i) r[i] = v[index[i]];
  return r;
}
template <class C>
TSK_INLINE Vec<C> shuffle(Vec<C> a, Vec<C> b, Mask<C> index) {
  Vec<C> r;
  for (int i = 0; i < kWidth<C>; ++i) r[i] = index[i] < kWidth<C> ? a[index[i]] : b[index[i] - kWidth<C>];
  return r;
}
#else
template <class C>
TSK_INLINE Vec<C> shuffle(Vec<C> v, Mask<C> index) {
  return __builtin_shuffle(v, index);
}
template <class C>
TSK_INLINE Vec<C> shuffle(Vec<C> a, Vec<C> b, Mask<C> index) {
  return __builtin_shuffle(a, b, index);
}
#endif

// The lower (or higher) halves of a and b, interleaved: a0 b0 a1 b1 ...
template <class C>
TSK_INLINE Vec<C> zip(Vec<C> a, Vec<C> b, bool high) {
  constexpr int W = kWidth<C>;
  Mask<C> index;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) index[i] = (high ? W / 2 : 0) + i / 2 + (i & 1) * W;
  return shuffle<C>(a, b, index);
}

// Transposes a W x W block held in W vectors: log2(W) rounds of perfect shuffles.
template <class C>
TSK_INLINE void transpose(Vec<C>* r) {
  constexpr int W = kWidth<C>;
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec<C> t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = zip<C>(r[i], r[i + W / 2], false);
      t[2 * i + 1] = zip<C>(r[i], r[i + W / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// --- exp ------------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0, relative error below 1e-7 (measured: 8.7e-8 over the range); exactly 0 under -87.3 (and so for
// -inf), NaN for NaN. x = n ln2 + r with n rounded to nearest, |r| <= ln2 / 2; the polynomial is fitted (minimax,
// degree 6) to that range.
TSK_INLINE Vec<float> exp(Vec<float> x) {
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, found in the low mantissa bits
  Vec<float> biased = x * 1.44269504f + magic, n = biased - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = r * 1.383678987622261e-3f + 8.374856784939766e-3f;
  p = p * r + 4.1668228805065155e-2f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Mask<float> exponent = ((Mask<float>)biased - 0x4b400000 + 127) << 23;
  p *= (Vec<float>)exponent;
  return x < -87.3f ? Vec<float>{} : p;
}
TSK_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace tsk::TSK_ISA
