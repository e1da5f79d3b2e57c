// SPDX-License-Identifier: Apache-2.0
// Attention in bfloat16 on matrix units: the same passes as forward.h and backward.h, products by tiles.
//
// P and dS are rounded to bfloat16 for the products that they enter, as PyTorch's are; scores, softmax and all sums
// stay in float32. The scale is applied to scores and gradients, so that q and k enter as they are stored.
#pragma once
#include "backward.h"

#if defined(__AMX_BF16__)
namespace tsk::TSK_ISA {

// n rows, packed and zero up to [rows x row].
inline void pack_as_stored(BFloat16* to, int64_t row, const Rows<BFloat16>& from, int64_t first, int64_t n,
                           int64_t rows, int64_t D) {
  for (int64_t i = 0; i < n; ++i) {
    memcpy(to + i * row, from(first + i), D * sizeof(BFloat16));
    memset(to + i * row + D, 0, (row - D) * sizeof(BFloat16));
  }
  memset(to + n * row, 0, (rows - n) * row * sizeof(BFloat16));
}

// The first n rows of q [n, row] with the bias of a head added, rounded once more.
inline void add_bias(BFloat16* q, int64_t row, int64_t n, const BFloat16* bias, int64_t D) {
  if (!bias) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D; d += kWidth<float>)
      store_some(q + i * row + d, load_some(q + i * row + d, D - d) + load_some(bias + d, D - d), D - d);
}

// The maximum of scale * s [n, padded].
inline float scaled_maximum(const float* s, int64_t n, float scale) {
  const int64_t last = (n - 1) / kTile * kTile;
  Vec<float> m = keep_below<float>(load(s + last) * scale, n - last, -__builtin_inff());
  for (int64_t j = 0; j < last; j += kTile) m = max<float>(m, load(s + j) * scale);
  return hmax<float>(m);
}

// p [n, padded] = exp(scale * s - max), unnormalised; zero from n to `depth`. Returns 1 / sum.
inline float softmax_to(BFloat16* p, const float* s, int64_t n, int64_t depth, float scale) {
  const float top = scaled_maximum(s, n, scale);
  const int64_t last = (n - 1) / kTile * kTile;
  Vec<float> sum{};
  for (int64_t j = 0; j < last; j += kTile) {
    const Vec<float> e = exp(load(s + j) * scale - top);
    store_as<BFloat16>(p + j, e);
    sum += e;
  }
  const Vec<float> e = keep_below<float>(exp(load(s + last) * scale - top), n - last, 0.0f);
  store_as<BFloat16>(p + last, e);
  for (int64_t j = last + kTile; j < depth; j += kTile) store_as<BFloat16>(p + j, Vec<float>{});
  return 1.0f / hsum<float>(sum + e);
}

inline void tile_forward(const Job& job, int64_t worker) {
  typedef BFloat16 T;
  const Call<T> c(job, false);
  const TskAttention& a = *job.a;
  const TileSizes t(c.keys, c.D, c.queries);
  Scratch<float> scratch = c.scratch_of(worker);
  const int64_t* tokens = c.sequence_tokens(scratch);
  const Tiles tiles;
  T* rows = t.take<T>(scratch, t.depth_keys * t.depth_dim);  // [keys, D]
  Word* kt = t.take<Word>(scratch, t.depth_dim / 2 * t.keys);
  Word* v = t.take<Word>(scratch, t.depth_keys / 2 * t.dim);
  T* q = t.take<T>(scratch, t.block * t.depth_dim);
  float* s = t.take<float>(scratch, t.block * t.keys);
  T* p = t.take<T>(scratch, t.block * t.depth_keys);
  float* o = t.take<float>(scratch, t.block * t.dim);

  c.items(worker, [&](int64_t b, int64_t g, int64_t h) {
    const int64_t token = c.group_token(g);
    const Rows<T> k_rows = c.rows(a.k, b, h, token, tokens, job.cls_key);
    const Rows<T> v_rows = c.rows(a.v, b, h, token, tokens, job.cls_key);
    const Rows<T> q_rows = c.rows(a.q, b, h, token, tokens, c.cls_query);
    const Rows<T> out_rows = c.rows(a.out, b, h, token, tokens, c.cls_query);
    pack_as_stored(rows, t.depth_dim, k_rows, 0, c.keys, t.depth_keys, c.D);
    transpose_words(kt, t.keys, (const Word*)rows, t.depth_dim / 2, t.keys, t.depth_dim / 2);
    pack_as_stored(rows, t.depth_dim, v_rows, 0, c.keys, t.depth_keys, c.D);
    pair_rows(v, t.dim, rows, t.depth_dim, t.depth_keys, t.dim);

    for (int64_t i0 = 0; i0 < c.queries; i0 += t.block) {
      const int64_t n = at_most(t.block, c.queries - i0), whole = round_up(n, kTile);
      fetch_ahead(a, q_rows, k_rows, v_rows, out_rows, i0, n, c.keys);
      float scale_o[TileSizes::kRows];
      pack_as_stored(q, t.depth_dim, q_rows, i0, n, whole, c.D);
      add_bias(q, t.depth_dim, n, c.q_bias(h), c.D);
      tile_gemm(whole, t.keys, t.depth_dim, q, t.depth_dim, kt, t.keys, s, t.keys, false);
      for (int64_t i = 0; i < n; ++i)
        scale_o[i] = softmax_to(p + i * t.depth_keys, s + i * t.keys, c.keys, t.depth_keys, c.scale);
      memset(p + n * t.depth_keys, 0, (whole - n) * t.depth_keys * sizeof(T));
      tile_gemm(whole, t.dim, t.depth_keys, p, t.depth_keys, v, t.dim, o, t.dim, false);
      for (int64_t i = 0; i < n; ++i) {
        if (c.cls_query && i0 + i == 0)
          store_row<float>(c.dq_cls + c.share(b, h, g), o, c.Dp, scale_o[0]);
        else
          store_row<T>(out_rows(i0 + i), o + i * t.dim, c.D, scale_o[i]);
      }
    }
  });
}

// Of one query, from its scores s and dP [keys, padded]: P and dS, times `weight`, zero from the keys to `depth`.
// With stats (max, 1 / sum, sum(P dP)) the query spans more than these keys, s holds scaled scores, and the first key
// is counted elsewhere.
inline void row_gradient(float* s, const float* dp, BFloat16* p, BFloat16* ds, int64_t n, int64_t depth, float scale,
                         float weight, const float* stats) {
  const int64_t last = (n - 1) / kTile * kTile;
  if (stats) scale = 1.0f;
  const float top = stats ? stats[0] : scaled_maximum(s, n, scale);
  Vec<float> sum{}, along{};
  for (int64_t j = 0; j <= last; j += kTile) {
    Vec<float> e = exp(load(s + j) * scale - top), d = load(dp + j);
    if (j == last) e = keep_below<float>(e, n - last, 0.0f), d = keep_below<float>(d, n - last, 0.0f);
    if (stats && j == 0) e[0] = 0;
    store(s + j, e);
    sum += e;
    along += e * d;
  }
  const float factor = stats ? stats[1] : 1.0f / hsum<float>(sum);
  const float delta = stats ? stats[2] : hsum<float>(along) * factor;
  for (int64_t j = 0; j <= last; j += kTile) {
    const Vec<float> x = load(s + j) * (factor * weight);
    Vec<float> y = x * (load(dp + j) - delta);
    if (j == last) y = keep_below<float>(y, n - last, 0.0f);
    store_as<BFloat16>(p + j, x);
    store_as<BFloat16>(ds + j, y);
  }
  for (int64_t j = last + kTile; j < depth; j += kTile)
    store_as<BFloat16>(p + j, Vec<float>{}), store_as<BFloat16>(ds + j, Vec<float>{});
}

inline void tile_backward(const Job& job, int64_t worker) {
  typedef BFloat16 T;
  const Call<T> c(job, true);
  const TskAttention& a = *job.a;
  const TileSizes t(c.keys, c.D, c.queries);
  Scratch<float> scratch = c.scratch_of(worker);
  const int64_t* tokens = c.sequence_tokens(scratch);
  const Tiles tiles;
  T* rows = t.take<T>(scratch, t.depth_keys * t.depth_dim);       // [keys, D]
  Word* k = t.take<Word>(scratch, t.depth_keys / 2 * t.dim);      // pairs of keys
  Word* kt = t.take<Word>(scratch, t.depth_dim / 2 * t.keys);     // pairs of elements
  Word* vt = t.take<Word>(scratch, t.depth_dim / 2 * t.keys);     // likewise
  float* dk = t.take<float>(scratch, t.keys * t.dim);             //
  float* dv = t.take<float>(scratch, t.keys * t.dim);             //
  T* q = t.take<T>(scratch, t.block * t.depth_dim);               // [block, D]
  T* dout = t.take<T>(scratch, t.block * t.depth_dim);            // [block, D]
  Word* q_pairs = t.take<Word>(scratch, t.block / 2 * t.dim);     // of queries
  Word* dout_pairs = t.take<Word>(scratch, t.block / 2 * t.dim);  //
  float* dq = t.take<float>(scratch, t.block * t.dim);            // [block, D]
  float* s = t.take<float>(scratch, t.block * t.keys);            // [block, keys]
  float* dp = t.take<float>(scratch, t.block * t.keys);           // [block, keys]
  T* p = t.take<T>(scratch, t.block * t.depth_keys);              // [block, keys]
  T* ds = t.take<T>(scratch, t.block * t.depth_keys);             // [block, keys]
  Word* pairs = t.take<Word>(scratch, t.block / 2 * t.keys);      // of queries, of P or dS
  Word* turned = t.take<Word>(scratch, t.keys * t.block / 2);     // P^T or dS^T
  float* cls = t.take<float>(scratch, c.Dp);
  const bool global = a.cls == TSK_CLS_GLOBAL;

  c.items(worker, [&](int64_t b, int64_t g, int64_t h) {
    const int64_t token = c.group_token(g);
    const Rows<T> k_rows = c.rows(a.k, b, h, token, tokens, job.cls_key);
    const Rows<T> v_rows = c.rows(a.v, b, h, token, tokens, job.cls_key);
    const Rows<T> q_rows = c.rows(a.q, b, h, token, tokens, c.cls_query);
    const Rows<T> dout_rows = c.rows(a.dout, b, h, token, tokens, c.cls_query);
    const Rows<T> dq_rows = c.rows(a.dq, b, h, token, tokens, c.cls_query);
    pack_as_stored(rows, t.depth_dim, v_rows, 0, c.keys, t.depth_keys, c.D);
    transpose_words(vt, t.keys, (const Word*)rows, t.depth_dim / 2, t.keys, t.depth_dim / 2);
    pack_as_stored(rows, t.depth_dim, k_rows, 0, c.keys, t.depth_keys, c.D);
    transpose_words(kt, t.keys, (const Word*)rows, t.depth_dim / 2, t.keys, t.depth_dim / 2);
    pair_rows(k, t.dim, rows, t.depth_dim, t.depth_keys, t.dim);

    for (int64_t i0 = 0; i0 < c.queries; i0 += t.block) {
      const int64_t n = at_most(t.block, c.queries - i0), whole = round_up(n, kTile), depth = round_up(n, kDeep);
      for (int64_t i = 0; i < n; ++i) claim_row<T>(dq_rows(i0 + i), c.D);
      pack_as_stored(q, t.depth_dim, q_rows, i0, n, depth, c.D);
      pack_as_stored(dout, t.depth_dim, dout_rows, i0, n, depth, c.D);
      tile_gemm(whole, t.keys, t.depth_dim, q, t.depth_dim, kt, t.keys, s, t.keys, false);
      tile_gemm(whole, t.keys, t.depth_dim, dout, t.depth_dim, vt, t.keys, dp, t.keys, false);
      for (int64_t i = 0; i < n; ++i) {
        float* si = s + i * t.keys;
        const bool first = c.cls_query && i0 + i == 0;
        const float* stats = global && first ? c.stats + (b * c.H + h) * 3 : nullptr;
        if (stats) {  // in the order of global_scores: against its maximum and sum, the last bit of a large score
                      // matters
          pack_row<T>(cls, q_rows(0), c.D, c.scale);
          for (int64_t j = 0; j < c.keys; ++j) si[j] = dot_row<T>(cls, k_rows(j), c.D);
        }
        row_gradient(si, dp + i * t.keys, p + i * t.depth_keys, ds + i * t.depth_keys, c.keys, t.depth_keys, c.scale,
                     first && !global ? c.weight(b, g) : 1.0f, stats);
      }
      memset(p + n * t.depth_keys, 0, (depth - n) * t.depth_keys * sizeof(T));
      memset(ds + n * t.depth_keys, 0, (depth - n) * t.depth_keys * sizeof(T));
      const auto transposed_times = [&](const T* x, const T* y, Word* y_pairs, float* sum) {
        pair_rows(pairs, t.keys, x, t.depth_keys, depth, t.keys);
        transpose_words(turned, depth / 2, pairs, t.keys, depth / 2, t.keys);
        pair_rows(y_pairs, t.dim, y, t.depth_dim, depth, t.dim);
        tile_gemm(t.keys, t.dim, depth, (const T*)turned, depth, y_pairs, t.dim, sum, t.dim, i0 > 0);
      };
      transposed_times(p, dout, dout_pairs, dv);
      transposed_times(ds, q, q_pairs, dk);
      tile_gemm(whole, t.dim, t.depth_keys, ds, t.depth_keys, k, t.dim, dq, t.dim, false);
      for (int64_t i = 0; i < n; ++i) {
        if (c.cls_query && i0 + i == 0)
          store_row<float>(c.dq_cls + c.share(b, h, g), dq, c.Dp, c.scale);
        else
          store_row<T>(dq_rows(i0 + i), dq + i * t.dim, c.D, c.scale);
      }
    }
    if (c.queries == 0) memset(dk, 0, t.keys * t.dim * sizeof(float)), memset(dv, 0, t.keys * t.dim * sizeof(float));
    const Rows<T> dk_rows = c.rows(a.dk, b, h, token, tokens, job.cls_key);
    const Rows<T> dv_rows = c.rows(a.dv, b, h, token, tokens, job.cls_key);
    if (job.cls_key) {
      store_row<float>(c.dk_cls + c.share(b, h, g), dk, c.Dp, c.scale);
      store_row<float>(c.dv_cls + c.share(b, h, g), dv, c.Dp, 1.0f);
    }
    for (int64_t j = job.cls_key; j < c.keys; ++j) {
      store_row<T>(dk_rows(j), dk + j * t.dim, c.D, c.scale);
      store_row<T>(dv_rows(j), dv + j * t.dim, c.D, 1.0f);
    }
  });
}

}  // namespace tsk::TSK_ISA
#endif
