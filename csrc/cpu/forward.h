// SPDX-License-Identifier: Apache-2.0
// Forward: one pass over the groups, one over the class rows.
#pragma once
#include "short.h"

namespace tsk::TSK_ISA {

template <class T>
void forward_groups(const Job& job, int64_t worker) {
  typedef Compute<T> C;
  const Call<T> c(job, false);
  const TskAttention& a = *job.a;
  Scratch<C> scratch = c.scratch_of(worker);
  const int64_t* tokens = c.sequence_tokens(scratch);
  C* kt = scratch.take(c.D * c.Kp);     // [D, Kp]
  C* v = scratch.take(c.keys * c.Dp);   // [keys, Dp]
  C* q = scratch.take(c.block * c.Dp);  // [block, Dp]
  C* s = scratch.take(c.block * c.Kp);  // [block, Kp]
  C* o = scratch.take(c.block * c.Dp);  // [block, Dp]

  c.items(worker, [&](int64_t b, int64_t g, int64_t h) {
    const int64_t token = c.group_token(g);
    const Rows<T> k_rows = c.rows(a.k, b, h, token, tokens, job.cls_key);
    const Rows<T> v_rows = c.rows(a.v, b, h, token, tokens, job.cls_key);
    const Rows<T> q_rows = c.rows(a.q, b, h, token, tokens, c.cls_query);
    const Rows<T> out_rows = c.rows(a.out, b, h, token, tokens, c.cls_query);
    pack_transposed<T>(kt, c.Kp, k_rows, c.keys, c.D);
    for (int64_t j = 0; j < c.keys; ++j) pack_row<T>(v + j * c.Dp, v_rows(j), c.D, C(1));

    for (int64_t i0 = 0; i0 < c.queries; i0 += c.block) {
      const int64_t n = at_most(c.block, c.queries - i0);
      fetch_ahead(a, q_rows, k_rows, v_rows, out_rows, i0, n, c.keys);
      C scale_o[kQueryRows], top;
      for (int64_t i = 0; i < n; ++i) pack_row<T>(q + i * c.Dp, q_rows(i0 + i), c.D, c.scale, c.q_bias(h));
      gemm<C>(n, c.Kp, c.D, q, c.Dp, 1, kt, c.Kp, s, c.Kp, false);
      for (int64_t i = 0; i < n; ++i) scale_o[i] = softmax_row<C>(s + i * c.Kp, c.keys, &top);
      gemm<C>(n, c.Dp, c.keys, s, c.Kp, 1, v, c.Dp, o, c.Dp, false);
      for (int64_t i = 0; i < n; ++i) {
        if (c.cls_query && i0 + i == 0)
          store_row<C>(c.dq_cls + c.share(b, h, g), o, c.Dp, scale_o[0]);
        else
          store_row<T>(out_rows(i0 + i), o + i * c.Dp, c.D, scale_o[i]);
      }
    }
  });
}

// The class query of mode "global" attends every token of the clip, itself included. Leaves exp(s - max) in p [tokens]
// and the query, scaled, in q [Dp]; returns the maximum and 1 / sum.
template <class T>
Compute<T> global_scores(const Call<T>& c, int64_t b, int64_t h, Compute<T>* q, Compute<T>* p, Compute<T>* top) {
  typedef Compute<T> C;
  pack_row<T>(q, row_of<T>(c.a.q, b, h, 0), c.D, c.scale, c.q_bias(h));
  for (int64_t j = 0; j < c.a.tokens; ++j) p[j] = dot_row<T>(q, row_of<T>(c.a.k, b, h, j), c.D);
  return softmax_row<C>(p, c.a.tokens, top);
}

template <class T>
void forward_cls(const Job& job, int64_t worker) {
  typedef Compute<T> C;
  const Call<T> c(job, false);
  const TskAttention& a = *job.a;
  Scratch<C> scratch = c.scratch_of(worker);
  C* row = scratch.take(c.Dp);
  c.heads(worker, [&](int64_t b, int64_t h) {
    T* out = row_of<T>(a.out, b, h, 0);
    memset(row, 0, c.Dp * sizeof(C));
    C factor = 1;
    if (a.cls == TSK_CLS_PER_GROUP) {
      for (int64_t g = 0; g < c.G; ++g) add_row<C>(row, c.dq_cls + c.share(b, h, g), c.Dp, c.weight(b, g));
    } else if (a.cls == TSK_CLS_GLOBAL) {
      Scratch<C> more = scratch;
      C* q = more.take(c.Dp);
      C* p = more.take(round_up(a.tokens, kWidth<C>));
      C top;
      factor = global_scores<T>(c, b, h, q, p, &top);
      for (int64_t j = 0; j < a.tokens; ++j) add_row<T>(row, row_of<T>(a.v, b, h, j), c.D, p[j]);
    }
    store_row<T>(out, row, c.D, factor);
  });
}

template <class T>
void forward(const Job& job, void (*groups)(const Job&, int64_t) = forward_groups<T>) {
  if (job.G && job.L + job.cls_key) job.parallel(job, is_short(job) ? short_attention<T, false> : groups);
  if (job.a->cls != TSK_CLS_NONE) job.parallel(job, forward_cls<T>);
}

}  // namespace tsk::TSK_ISA
