// SPDX-License-Identifier: Apache-2.0
// Short sequences (time attention up to 16 frames), where a matrix-product routine is all overhead.
//
// A sequence is a handful of rows, so rows are read where they lie and scores never leave the first-level cache. Scores
// are dot products: W of them at a time keep W accumulators, and a tree of shuffles adds each accumulator's lanes into
// one lane of the result, half a shuffle a product. Rows of scores have the fixed length LQ (4, 8 or 16); several fit
// one vector and softmax treats them together. The products with P, dS and their transposes are ordinary tiles.
#pragma once
#include "call.h"

namespace tsk::TSK_ISA {

constexpr int64_t kShort = 16;

// Half a transpose: the lower and the upper halves of x and y side by side, added. Halves are of 128-bit lanes
// (kWithin), of the vector, or (kPairs) the even and the odd lanes: shuffles that every x86 does in one instruction.
enum Fold { kWithin, kHalves, kPairs };
template <class C, Fold FOLD>
TSK_INLINE Vec<C> fold(Vec<C> x, Vec<C> y) {
  constexpr int W = kWidth<C>, E = 16 / int(sizeof(C)), N = W / E;  // E elements in each of N lanes
  Mask<C> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const int lane = i / E, e = i % E;
    if (FOLD == kWithin) {
      low[i] = lane * E + e / 2 + (e & 1) * W;
      high[i] = low[i] + E / 2;
    } else {
      const int of_y = lane >= N / 2 ? W : 0, at = lane % (N / 2 ? N / 2 : 1);
      low[i] = of_y + (FOLD == kHalves ? at : 2 * at) * E + e;
      high[i] = low[i] + (FOLD == kHalves ? N / 2 : 1) * E;
    }
  }
  return shuffle<C>(x, y, low) + shuffle<C>(x, y, high);
}

// Adds up the lanes of each of W vectors: lane e of the result is the sum of acc[e].
template <class C>
TSK_INLINE Vec<C> sum_lanes(const Vec<C>* acc) {
  constexpr int E = 16 / int(sizeof(C)), N = kWidth<C> / E;
  Vec<C> part[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Vec<C>* a = acc + n * E;
    if constexpr (E == 4)
      part[n] = fold<C, kWithin>(fold<C, kWithin>(a[0], a[2]), fold<C, kWithin>(a[1], a[3]));
    else
      part[n] = fold<C, kWithin>(a[0], a[1]);
  }
  if constexpr (N == 4)
    return fold<C, kPairs>(fold<C, kHalves>(part[0], part[1]), fold<C, kHalves>(part[2], part[3]));
  else if constexpr (N == 2)
    return fold<C, kPairs>(part[0], part[1]);
  else
    return part[0];
}

// Rows held as C, zero-padded to whole vectors: the tensor itself where it already is that, else a packed copy, to
// which a bias is added.
template <class C>
struct Matrix {
  const C* data;
  int64_t stride;
};

template <class T>
TSK_INLINE Matrix<Compute<T>> as_matrix(const T* x, int64_t stride, int64_t L, int64_t D, Compute<T>* packed,
                                        const T* bias = nullptr) {
  typedef Compute<T> C;
  if constexpr (sizeof(T) == sizeof(C))
    if (D % kWidth<C> == 0 && !bias) return {reinterpret_cast<const C*>(x), stride};
  const int64_t Dp = round_up(D, kWidth<C>);
  for (int64_t i = 0; i < L; ++i) pack_row<T>(packed + i * Dp, x + i * stride, D, C(1), bias);
  return {packed, Dp};
}

// s [L, LQ] = x y^T; columns and rows from L on hold copies of the last one.
template <class C, int LQ>
TSK_INLINE void dots(C* s, const Matrix<C>& x, const Matrix<C>& y, int64_t L, int64_t Dp) {
  constexpr int W = kWidth<C>, NK = LQ < W ? LQ : W, NR = W / NK;  // NR x NK products to a vector
  for (int64_t i0 = 0; i0 < L; i0 += NR)
    for (int64_t j0 = 0; j0 < L; j0 += NK) {
      Vec<C> acc[W];
#pragma GCC unroll 16
      for (int e = 0; e < W; ++e) acc[e] = Vec<C>{};
      for (int64_t d = 0; d < Dp; d += W) {
        Vec<C> xd[NR];
#pragma GCC unroll 4
        for (int i = 0; i < NR; ++i) xd[i] = load(x.data + at_most(i0 + i, L - 1) * x.stride + d);
#pragma GCC unroll 16
        for (int j = 0; j < NK; ++j) {
          const Vec<C> yd = load(y.data + at_most(j0 + j, L - 1) * y.stride + d);
#pragma GCC unroll 4
          for (int i = 0; i < NR; ++i) acc[i * NK + j] += xd[i] * yd;
        }
      }
      store(s + i0 * LQ + j0, sum_lanes<C>(acc));
    }
}

// Lane i of the result is lane i ^ STEP of v. A template, so that the index is a constant.
template <class C, int STEP>
TSK_INLINE Vec<C> swap_lanes(Vec<C> v) {
  Mask<C> index;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<C>; ++i) index[i] = i ^ STEP;
  return shuffle<C>(v, index);
}

// Every lane of a run of N lanes (a power of two) gets the run's maximum, or sum.
template <class C, int N, bool kMax, int STEP = 1>
TSK_INLINE Vec<C> reduce_runs(Vec<C> v) {
  if constexpr (STEP < N && STEP < kWidth<C>) {
    const Vec<C> other = swap_lanes<C, STEP>(v);
    return reduce_runs<C, N, kMax, 2 * STEP>(kMax ? max<C>(v, other) : v + other);
  } else {
    return v;
  }
}

// s [L, LQ] -> softmax(scale s) of each row, zero from column L on.
template <class C, int LQ>
TSK_INLINE void softmax_short(C* s, int64_t L, C scale) {
  constexpr int W = kWidth<C>, NV = LQ > W ? LQ / W : 1, step = NV * W;  // a row is NV vectors, or a part of one
  Mask<C> column;
  for (int i = 0; i < W; ++i) column[i] = i % LQ;
  for (C *row = s, *end = s + L * LQ; row < end; row += step) {
    Vec<C> x[NV], m, sum{};
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      // -inf, not 0: padding must not enter the softmax
      x[n] = column < int32_t(L) - n * W ? load(row + n * W) * scale : splat(-C(__builtin_inf()));
      m = n ? max<C>(m, x[n]) : x[n];
    }
    m = reduce_runs<C, LQ, true>(m);
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      x[n] = exp(x[n] - m);
      sum += x[n];
    }
    sum = C(1) / reduce_runs<C, LQ, false>(sum);
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(row + n * W, x[n] * sum);
  }
}

// p, ds [L, LQ]: ds (holding dP) = scale p (dP - sum_j(p dP))
template <class C, int LQ>
TSK_INLINE void score_gradient_short(const C* p, C* ds, int64_t L, C scale) {
  constexpr int W = kWidth<C>, NV = LQ > W ? LQ / W : 1, step = NV * W;
  const int64_t used = at_most(NV, (L + W - 1) / W);  // `dots` has written no more
  for (int64_t at = 0; at < L * LQ; at += step) {
    Vec<C> delta{};
    for (int64_t n = 0; n < used; ++n) delta += load(p + at + n * W) * load(ds + at + n * W);
    delta = reduce_runs<C, LQ, false>(delta);
    for (int64_t n = 0; n < used; ++n) {
      C* y = ds + at + n * W;
      store(y, load(p + at + n * W) * (load(y) - delta) * scale);
    }
  }
}

// y [L rows] = w [L, L] m with element strides of w, straight to the tensor where its rows are whole vectors of C.
template <class T>
TSK_INLINE void mix(T* y, int64_t stride, const Compute<T>* w, int64_t w_row, int64_t w_col,
                    const Matrix<Compute<T>>& m, int64_t L, int64_t D, Compute<T>* buffer) {
  typedef Compute<T> C;
  const int64_t Dp = round_up(D, kWidth<C>);
  if constexpr (sizeof(T) == sizeof(C))
    if (D % kWidth<C> == 0)
      return gemm<C>(L, D, L, w, w_row, w_col, m.data, m.stride, reinterpret_cast<C*>(y), stride, false);
  gemm<C>(L, Dp, L, w, w_row, w_col, m.data, m.stride, buffer, Dp, false);
  for (int64_t i = 0; i < L; ++i) store_row<T>(y + i * stride, buffer + i * Dp, D, C(1));
}

template <class T, int LQ>
void short_groups(const Job& job, int64_t worker, bool backward) {
  typedef Compute<T> C;
  const Call<T> c(job, backward);
  const TskAttention& a = *job.a;
  const int64_t L = c.L, D = c.D, Dp = c.Dp, step = a.sequence[0].step;
  Scratch<C> scratch = c.scratch_of(worker);
  C *packed[5], p[LQ * LQ + 16], ds[LQ * LQ + 16];
  for (C*& x : packed) x = scratch.take(L * Dp);

  c.items(worker, [&](int64_t b, int64_t g, int64_t h) {
    const int64_t token = c.group_token(g);
    const auto matrix = [&](const TskTensor& x, C* copy, const T* bias = nullptr) {
      return as_matrix<T>(row_of<T>(x, b, h, token), step * x.token, L, D, copy, bias);
    };
    const auto mix_into = [&](const TskTensor& y, const C* w, int64_t row, int64_t col, const Matrix<C>& m) {
      mix<T>(row_of<T>(y, b, h, token), step * y.token, w, row, col, m, L, D, packed[4]);
    };
    const auto expect = [&](const TskTensor& x, int64_t at) {
      for (int64_t i = 0; i < L; ++i) expect_row<T>(row_of<T>(x, b, h, at) + i * step * x.token, D);
    };
    const auto claim = [&](const TskTensor& x) {
      for (int64_t i = 0; i < L; ++i) claim_row<T>(row_of<T>(x, b, h, token) + i * step * x.token, D);
    };
    if (g + 1 < c.G) {
      const int64_t next = c.group_token(g + 1);
      expect(a.q, next), expect(a.k, next), expect(a.v, next);
      if (backward) expect(a.dout, next);
    }
    if (backward)
      claim(a.dv), claim(a.dq), claim(a.dk);
    else
      claim(a.out);
    const Matrix<C> q = matrix(a.q, packed[0], c.q_bias(h)), k = matrix(a.k, packed[1]), v = matrix(a.v, packed[2]);
    dots<C, LQ>(p, q, k, L, Dp);
    softmax_short<C, LQ>(p, L, c.scale);
    if (!backward) return mix_into(a.out, p, LQ, 1, v);

    const Matrix<C> dout = matrix(a.dout, packed[3]);
    dots<C, LQ>(ds, dout, v, L, Dp);
    score_gradient_short<C, LQ>(p, ds, L, c.scale);
    mix_into(a.dv, p, 1, LQ, dout);
    mix_into(a.dq, ds, LQ, 1, k);
    mix_into(a.dk, ds, 1, LQ, q);
  });
}

// Whether a call is made of short sequences along one axis, without a class row in them.
inline bool is_short(const Job& job) {
  return !job.cls_key && job.L <= kShort && job.a->sequence[1].size * job.a->sequence[2].size == 1;
}

template <class T, bool kBackward>
void short_attention(const Job& job, int64_t worker) {
  if (job.L <= 4) return short_groups<T, 4>(job, worker, kBackward);
  if (job.L <= 8) return short_groups<T, 8>(job, worker, kBackward);
  short_groups<T, 16>(job, worker, kBackward);
}

}  // namespace tsk::TSK_ISA
