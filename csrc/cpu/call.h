// SPDX-License-Identifier: Apache-2.0
// What forward and backward share: rows of strided tensors in and out of cache, softmax, and the layout of a call.
#pragma once
#include "attention.h"
#include "gemm.h"
#include "tiles.h"

namespace tsk::TSK_ISA {

constexpr int64_t kQueryRows = 48;

TSK_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
TSK_INLINE int64_t largest(int64_t n, int64_t m) { return n > m ? n : m; }
TSK_INLINE int64_t at_most(int64_t n, int64_t m) { return n < m ? n : m; }

// --- rows of a tensor -----------------------------------------------------------------------------------------------

template <class T>
T* row_of(const TskTensor& x, int64_t b, int64_t h, int64_t token) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + token * x.token;
}

// The members of one group in one tensor: the class row first where it takes part, then the patches.
template <class T>
struct Rows {
  T *cls, *patches;
  const int64_t* tokens;  // of the sequence, relative to the group's first patch
  int64_t stride;
  T* operator()(int64_t i) const {
    return cls ? (i ? patches + tokens[i - 1] * stride : cls) : patches + tokens[i] * stride;
  }
};

// Rows of a sequence lie far apart in memory, no stream that the hardware could foresee. Ask for the lines of a row
// that will be read soon (into the second level), or written soon. An address nobody owns does no harm.
template <class T>
TSK_INLINE void expect_row(const T* x, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + d, 0, 2);
}
template <class T>
TSK_INLINE void claim_row(const T* x, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + d, 1);
}

template <class T>
TSK_INLINE Vec<Compute<T>> load_some(const T* p, int64_t n) {  // lanes from n on are zero
  if (n >= kWidth<Compute<T>>) return load_as<T>(p);
  Vec<Compute<T>> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = to_compute(p[i]);
  return v;
}
template <class T>
TSK_INLINE void store_some(T* p, Vec<Compute<T>> v, int64_t n) {
  if (n >= kWidth<Compute<T>>) return store_as<T>(p, v);
  for (int64_t i = 0; i < n; ++i) from_compute(p[i], Compute<T>(v[i]));
}

// Rows i to i + n of a sequence: their outputs will be written now, what the next head reads there comes after.
template <class T>
TSK_INLINE void fetch_ahead(const TskAttention& a, const Rows<T>& q, const Rows<T>& k, const Rows<T>& v,
                            const Rows<T>& out, int64_t i, int64_t n, int64_t keys) {
  for (const int64_t end = i + n; i < end; ++i) {
    const int64_t key = i < keys ? i : keys - 1;
    claim_row<T>(out(i), a.head_dim);
    expect_row<T>(q(i) + a.q.head, a.head_dim);
    expect_row<T>(k(key) + a.k.head, a.head_dim);
    expect_row<T>(v(key) + a.v.head, a.head_dim);
  }
}

// dst [Dp] = (x + bias) * factor, zero from D on; bias may be null.
template <class T>
void pack_row(Compute<T>* dst, const T* x, int64_t D, Compute<T> factor, const T* bias = nullptr) {
  typedef Compute<T> C;
  constexpr int W = kWidth<C>;
  if (!bias)
    for (int64_t d = 0; d < D; d += W) store<C>(dst + d, load_some<T>(x + d, D - d) * factor);
  else
    for (int64_t d = 0; d < D; d += W)
      store<C>(dst + d, (load_some<T>(x + d, D - d) + load_some<T>(bias + d, D - d)) * factor);
}
template <class T>
void store_row(T* dst, const Compute<T>* x, int64_t D, Compute<T> factor) {
  typedef Compute<T> C;
  for (int64_t d = 0; d < D; d += kWidth<C>) store_some<T>(dst + d, load<C>(x + d) * factor, D - d);
}

// dst [D x ld] = the n rows transposed; columns from n to the next multiple of the width are zero.
template <class T>
void pack_transposed(Compute<T>* dst, int64_t ld, const Rows<T>& rows, int64_t n, int64_t D) {
  typedef Compute<T> C;
  constexpr int W = kWidth<C>;
  for (int64_t i = 0; i < n; i += W)
    for (int64_t d = 0; d < D; d += W) {
      Vec<C> block[W];
      for (int r = 0; r < W; ++r) block[r] = i + r < n ? load_some<T>(rows(i + r) + d, D - d) : Vec<C>{};
      transpose<C>(block);
      for (int64_t r = 0; r < at_most(W, D - d); ++r) store<C>(dst + (d + r) * ld + i, block[r]);
    }
}

// y [Dp] += factor * x
template <class T>
void add_row(Compute<T>* y, const T* x, int64_t D, Compute<T> factor) {
  typedef Compute<T> C;
  for (int64_t d = 0; d < D; d += kWidth<C>) store<C>(y + d, load(y + d) + load_some<T>(x + d, D - d) * factor);
}
template <class T>
Compute<T> dot_row(const Compute<T>* x, const T* y, int64_t D) {
  typedef Compute<T> C;
  Vec<C> sum{};
  for (int64_t d = 0; d < D; d += kWidth<C>) sum += load(x + d) * load_some<T>(y + d, D - d);
  return hsum<C>(sum);
}

// --- softmax --------------------------------------------------------------------------------------------------------

// s [n, padded] -> exp(s - top), zero from n on; returns the sum.
template <class C>
C exp_row(C* s, int64_t n, C top) {
  constexpr int W = kWidth<C>;
  const int64_t last = (n - 1) / W * W;
  Vec<C> sum = keep_below<C>(exp(load(s + last) - top), n - last, C(0));
  store(s + last, sum);
  for (int64_t j = 0; j < last; j += W) {
    const Vec<C> p = exp(load(s + j) - top);
    store(s + j, p);
    sum += p;
  }
  return hsum<C>(sum);
}

// s [n, padded] -> exp(s - max), unnormalised, zero from n on; returns 1 / sum. A NaN, or a row of -inf, makes the
// whole row NaN, as in eager.
template <class C>
C softmax_row(C* s, int64_t n, C* top) {
  constexpr int W = kWidth<C>;
  const int64_t last = (n - 1) / W * W;
  Vec<C> m = keep_below<C>(load(s + last), n - last, -C(__builtin_inf()));  // not 0: padding must not win the maximum
  for (int64_t j = 0; j < last; j += W) m = max<C>(m, load(s + j));
  *top = hmax<C>(m);
  return C(1) / exp_row<C>(s, n, *top);
}

// --- one call -------------------------------------------------------------------------------------------------------

template <class C>
struct Scratch {  // bump allocation over the caller's workspace, in 64-byte steps
  char* at;
  C* take(int64_t n) {
    C* p = reinterpret_cast<C*>(at);
    at += round_up(n * int64_t(sizeof(C)), 64);
    return p;
  }
};

// Everything about a call that does not depend on the item. Null workspace: used to measure.
template <class T>
struct Call {
  typedef Compute<T> C;
  const Job& job;
  const TskAttention& a;
  const int64_t B, G, L, H, D, Dp;
  const int64_t keys;     // of a group: L + 1 with a class key
  const int64_t Kp;       // keys, rounded up to whole vectors
  const bool cls_query;   // the class row is a query of every group
  const int64_t queries;  // of a group
  const int64_t block;    // query rows at a time
  const int64_t first;    // token row of the first patch
  const C scale;
  C *dq_cls, *dk_cls,
      *dv_cls;  // [B, H, G, Dp] the groups' shares of the class row; forward uses dq_cls for its outputs
  C* stats;     // [B, H, 3] of the global class query: max, 1 / sum, sum(P dP)
  char* scratch;
  int64_t scratch_bytes, bytes;

  Call(const Job& j, bool backward)
      : job(j),
        a(*j.a),
        B(a.batch),
        G(j.G),
        L(j.L),
        H(a.heads),
        D(a.head_dim),
        Dp(round_up(D, kWidth<C>)),
        keys(L + j.cls_key),
        Kp(round_up(keys, kWidth<C>)),
        cls_query(a.cls == TSK_CLS_PER_GROUP || (backward && a.cls == TSK_CLS_GLOBAL)),
        queries(L + cls_query),
        block(at_most(kQueryRows, queries)),
        first(a.cls != TSK_CLS_NONE),
        scale(C(a.scale)) {
    Scratch<C> s{static_cast<char*>(a.workspace)};
    const int64_t share = B * H * G * Dp;
    dq_cls = s.take(cls_query ? share : 0);
    dk_cls = s.take(backward && job.cls_key ? share : 0);
    dv_cls = s.take(backward && job.cls_key ? share : 0);
    stats = s.take(backward && a.cls == TSK_CLS_GLOBAL ? B * H * 3 : 0);
    scratch = s.at;
    const int64_t pad = 64 / int64_t(sizeof(C));  // take() rounds up to 64 bytes
    const int64_t row = block * Dp + pad, square = block * Kp + pad, packed = keys * Dp + pad, turned = D * Kp + pad;
    const int64_t by_block =
        backward ? 3 * packed + 2 * turned + 3 * row + 2 * square : packed + turned + 2 * row + square;
    const int64_t by_short = 5 * packed;
    const int64_t by_class = 5 * (Dp + pad) + (a.cls == TSK_CLS_GLOBAL ? round_up(a.tokens, kWidth<C>) + pad : 0);
    int64_t by_tiles = 0;
#if defined(__AMX_BF16__)
    by_tiles = TileSizes(keys, D, queries).scratch(backward);
#endif
    const int64_t token_list = L * 8 / int64_t(sizeof(C)) + pad;
    scratch_bytes = round_up(
        (token_list + largest(largest(by_block, by_tiles), largest(by_short, by_class))) * int64_t(sizeof(C)), 64);
    bytes = scratch - static_cast<char*>(a.workspace) + scratch_bytes * job.workers;
  }

  Scratch<C> scratch_of(int64_t worker) const { return {scratch + worker * scratch_bytes}; }

  int64_t* sequence_tokens(Scratch<C>& s) const {
    int64_t* tokens = reinterpret_cast<int64_t*>(s.take(L * 8 / int64_t(sizeof(C))));
    const TskAxis* q = a.sequence;
    int64_t n = 0;
    for (int64_t i = 0; i < q[0].size; ++i)
      for (int64_t j = 0; j < q[1].size; ++j)
        for (int64_t k = 0; k < q[2].size; ++k) tokens[n++] = i * q[0].step + j * q[1].step + k * q[2].step;
    return tokens;
  }

  int64_t group_token(int64_t g) const {  // row of the group's first patch
    const TskAxis* q = a.groups;
    return first + g / (q[1].size * q[2].size) * q[0].step + g / q[2].size % q[1].size * q[1].step +
           g % q[2].size * q[2].step;
  }

  Rows<T> rows(const TskTensor& x, int64_t b, int64_t h, int64_t token, const int64_t* tokens, bool with_cls) const {
    return {with_cls ? row_of<T>(x, b, h, 0) : nullptr, row_of<T>(x, b, h, token), tokens, x.token};
  }

  const T* q_bias(int64_t h) const { return a.q_bias ? static_cast<const T*>(a.q_bias) + h * D : nullptr; }

  int64_t share(int64_t b, int64_t h, int64_t g) const { return ((b * H + h) * G + g) * Dp; }
  C weight(int64_t b, int64_t g) const { return a.cls_weights ? C(a.cls_weights[b * G + g]) : C(1) / C(G); }

  // Calls item(b, g, h) for the worker's part of B x G x H; heads are neighbours in memory, so they come innermost.
  template <class F>
  void items(int64_t worker, F item) const {
    const int64_t n = B * G * H, begin = n * worker / job.workers, end = n * (worker + 1) / job.workers;
    int64_t h = begin % H, g = begin / H % G, b = begin / (G * H);
    for (int64_t i = begin; i < end; ++i) {
      item(b, g, h);
      if (++h == H) h = 0, ++g;
      if (g == G) g = 0, ++b;
    }
  }
  template <class F>
  void heads(int64_t worker, F item) const {
    const int64_t n = B * H;
    for (int64_t i = n * worker / job.workers, end = n * (worker + 1) / job.workers; i < end; ++i) item(i / H, i % H);
  }
};

}  // namespace tsk::TSK_ISA
