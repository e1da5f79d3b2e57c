// SPDX-License-Identifier: Apache-2.0
// Backward: recomputes P from q, k and v, then one pass over the groups and one over the class rows. No atomics.
#pragma once
#include "forward.h"

namespace tsk::TSK_ISA {

// p [n, padded] *= factor, and the row's sum of p * dp.
template <class C>
C normalise_and_dot(C* p, const C* dp, int64_t n, C factor) {
  Vec<C> sum{};
  for (int64_t j = 0; j < n; j += kWidth<C>) {
    const Vec<C> x = load(p + j) * factor;
    store(p + j, x);
    sum += x * load(dp + j);
  }
  return hsum<C>(sum);
}

// dp [n, padded] = p (dp - delta)
template <class C>
void score_gradient(const C* p, C* dp, int64_t n, C delta) {
  for (int64_t j = 0; j < n; j += kWidth<C>) store(dp + j, load(p + j) * (load(dp + j) - delta));
}

// Mode "global": the maximum, 1 / sum and delta of the class query, which spans all groups.
template <class T>
void backward_stats(const Job& job, int64_t worker) {
  typedef Compute<T> C;
  const Call<T> c(job, true);
  const TskAttention& a = *job.a;
  Scratch<C> scratch = c.scratch_of(worker);
  C* q = scratch.take(c.Dp);
  C* dout = scratch.take(c.Dp);
  C* p = scratch.take(round_up(a.tokens, kWidth<C>));
  c.heads(worker, [&](int64_t b, int64_t h) {
    C* stats = c.stats + (b * c.H + h) * 3;
    stats[1] = global_scores<T>(c, b, h, q, p, &stats[0]);
    pack_row<T>(dout, row_of<T>(a.dout, b, h, 0), c.D, C(1));
    C delta = 0;
    for (int64_t j = 0; j < a.tokens; ++j) delta += p[j] * stats[1] * dot_row<T>(dout, row_of<T>(a.v, b, h, j), c.D);
    stats[2] = delta;
  });
}

template <class T>
void backward_groups(const Job& job, int64_t worker) {
  typedef Compute<T> C;
  const Call<T> c(job, true);
  const TskAttention& a = *job.a;
  Scratch<C> scratch = c.scratch_of(worker);
  const int64_t* tokens = c.sequence_tokens(scratch);
  C* k = scratch.take(c.keys * c.Dp);      // [keys, Dp]
  C* kt = scratch.take(c.D * c.Kp);        // [D, Kp]
  C* vt = scratch.take(c.D * c.Kp);        // [D, Kp]
  C* dk = scratch.take(c.keys * c.Dp);     // [keys, Dp]
  C* dv = scratch.take(c.keys * c.Dp);     // [keys, Dp]
  C* q = scratch.take(c.block * c.Dp);     // [block, Dp]
  C* dout = scratch.take(c.block * c.Dp);  // [block, Dp]
  C* dq = scratch.take(c.block * c.Dp);    // [block, Dp]
  C* p = scratch.take(c.block * c.Kp);     // [block, Kp]
  C* ds = scratch.take(c.block * c.Kp);    // [block, Kp]
  const bool global = a.cls == TSK_CLS_GLOBAL;

  c.items(worker, [&](int64_t b, int64_t g, int64_t h) {
    const int64_t token = c.group_token(g);
    const Rows<T> k_rows = c.rows(a.k, b, h, token, tokens, job.cls_key);
    const Rows<T> v_rows = c.rows(a.v, b, h, token, tokens, job.cls_key);
    const Rows<T> q_rows = c.rows(a.q, b, h, token, tokens, c.cls_query);
    const Rows<T> dout_rows = c.rows(a.dout, b, h, token, tokens, c.cls_query);
    const Rows<T> dq_rows = c.rows(a.dq, b, h, token, tokens, c.cls_query);
    pack_transposed<T>(kt, c.Kp, k_rows, c.keys, c.D);
    pack_transposed<T>(vt, c.Kp, v_rows, c.keys, c.D);
    for (int64_t j = 0; j < c.keys; ++j) pack_row<T>(k + j * c.Dp, k_rows(j), c.D, C(1));

    for (int64_t i0 = 0; i0 < c.queries; i0 += c.block) {
      const int64_t n = at_most(c.block, c.queries - i0);
      for (int64_t i = 0; i < n; ++i) claim_row<T>(dq_rows(i0 + i), c.D);
      for (int64_t i = 0; i < n; ++i) {
        const bool mean = c.cls_query && !global && i0 + i == 0;
        pack_row<T>(q + i * c.Dp, q_rows(i0 + i), c.D, c.scale);
        pack_row<T>(dout + i * c.Dp, dout_rows(i0 + i), c.D, mean ? c.weight(b, g) : C(1));
      }
      gemm<C>(n, c.Kp, c.D, q, c.Dp, 1, kt, c.Kp, p, c.Kp, false);
      gemm<C>(n, c.Kp, c.D, dout, c.Dp, 1, vt, c.Kp, ds, c.Kp, false);
      for (int64_t i = 0; i < n; ++i) {
        C *pi = p + i * c.Kp, *dsi = ds + i * c.Kp, delta;
        if (global && i0 + i == 0) {  // normalised over the whole clip; the class key itself is left to backward_cls
          // Scores anew, summed in the order of global_scores: against its maximum and sum, the last bit of a large
          // score matters.
          for (int64_t j = 0; j < c.keys; ++j) pi[j] = dot_row<C>(q, k + j * c.Dp, c.Dp);
          const C* stats = c.stats + (b * c.H + h) * 3;
          exp_row<C>(pi, c.keys, stats[0]);
          pi[0] = 0;
          normalise_and_dot<C>(pi, dsi, c.Kp, stats[1]);
          delta = stats[2];
        } else {
          C top, factor = softmax_row<C>(pi, c.keys, &top);
          delta = normalise_and_dot<C>(pi, dsi, c.Kp, factor);
        }
        score_gradient<C>(pi, dsi, c.Kp, delta);
      }
      gemm<C>(c.keys, c.Dp, n, p, 1, c.Kp, dout, c.Dp, dv, c.Dp, i0 > 0);
      gemm<C>(c.keys, c.Dp, n, ds, 1, c.Kp, q, c.Dp, dk, c.Dp, i0 > 0);
      gemm<C>(n, c.Dp, c.keys, ds, c.Kp, 1, k, c.Dp, dq, c.Dp, false);
      for (int64_t i = 0; i < n; ++i) {
        if (c.cls_query && i0 + i == 0)
          store_row<C>(c.dq_cls + c.share(b, h, g), dq, c.Dp, c.scale);
        else
          store_row<T>(dq_rows(i0 + i), dq + i * c.Dp, c.D, c.scale);
      }
    }
    const Rows<T> dk_rows = c.rows(a.dk, b, h, token, tokens, job.cls_key);
    const Rows<T> dv_rows = c.rows(a.dv, b, h, token, tokens, job.cls_key);
    if (c.queries == 0) memset(dk, 0, c.keys * c.Dp * sizeof(C)), memset(dv, 0, c.keys * c.Dp * sizeof(C));

    if (job.cls_key) {
      store_row<C>(c.dk_cls + c.share(b, h, g), dk, c.Dp, C(1));
      store_row<C>(c.dv_cls + c.share(b, h, g), dv, c.Dp, C(1));
    }
    for (int64_t j = job.cls_key; j < c.keys; ++j) {
      store_row<T>(dk_rows(j), dk + j * c.Dp, c.D, C(1));
      store_row<T>(dv_rows(j), dv + j * c.Dp, c.D, C(1));
    }
  });
}

template <class T>
void backward_cls(const Job& job, int64_t worker) {
  typedef Compute<T> C;
  const Call<T> c(job, true);
  const TskAttention& a = *job.a;
  Scratch<C> scratch = c.scratch_of(worker);
  C* dq = scratch.take(c.Dp);
  C* dk = scratch.take(c.Dp);
  C* dv = scratch.take(c.Dp);
  C* q = scratch.take(c.Dp);
  C* dout = scratch.take(c.Dp);
  c.heads(worker, [&](int64_t b, int64_t h) {
    memset(dq, 0, c.Dp * sizeof(C)), memset(dk, 0, c.Dp * sizeof(C)), memset(dv, 0, c.Dp * sizeof(C));
    for (int64_t g = 0; g < c.G; ++g) {
      if (c.cls_query) add_row<C>(dq, c.dq_cls + c.share(b, h, g), c.Dp, C(1));
      if (job.cls_key) add_row<C>(dk, c.dk_cls + c.share(b, h, g), c.Dp, C(1));
      if (job.cls_key) add_row<C>(dv, c.dv_cls + c.share(b, h, g), c.Dp, C(1));
    }
    if (a.cls == TSK_CLS_GLOBAL) {  // the class query on the class key, which no group has counted
      const C* stats = c.stats + (b * c.H + h) * 3;
      const T *k_row = row_of<T>(a.k, b, h, 0), *v_row = row_of<T>(a.v, b, h, 0);
      pack_row<T>(q, row_of<T>(a.q, b, h, 0), c.D, c.scale);
      pack_row<T>(dout, row_of<T>(a.dout, b, h, 0), c.D, C(1));
      const C p = exp(splat<C>(dot_row<T>(q, k_row, c.D) - stats[0]))[0] * stats[1];
      const C ds = p * (dot_row<T>(dout, v_row, c.D) - stats[2]);
      add_row<T>(dq, k_row, c.D, ds * c.scale);
      add_row<C>(dk, q, c.Dp, ds);
      add_row<C>(dv, dout, c.Dp, p);
    }
    store_row<T>(row_of<T>(a.dq, b, h, 0), dq, c.D, C(1));
    store_row<T>(row_of<T>(a.dk, b, h, 0), dk, c.D, C(1));
    store_row<T>(row_of<T>(a.dv, b, h, 0), dv, c.D, C(1));
  });
}

template <class T>
void backward(const Job& job, void (*groups)(const Job&, int64_t) = backward_groups<T>) {
  if (job.a->cls == TSK_CLS_GLOBAL) job.parallel(job, backward_stats<T>);
  if (job.G && job.L + job.cls_key) job.parallel(job, is_short(job) ? short_attention<T, true> : groups);
  if (job.a->cls != TSK_CLS_NONE) job.parallel(job, backward_cls<T>);
}

}  // namespace tsk::TSK_ISA
