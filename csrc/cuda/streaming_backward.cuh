// SPDX-License-Identifier: Apache-2.0
// Backward of the sequences of streaming.cuh, from the forward's output and statistics: a kernel that owns queries (s,
// dp, dq) and leaves what the other needs, then one that owns keys (s, dp, dk, dv): seven products. No atomics: the
// same bits at every run.
#pragma once
#include "streaming.cuh"

namespace tsk {

// --- kernels -------------------------------------------------------------------------------------------------------

// sums += products of rows g and g + 8 of two operands, this lane's share.
template <class T, int D>
DEVICE void add_products(float (&sums)[2], const LeftRows<D>& a, const LeftRows<D>& b) {
#pragma unroll
  for (int i = 0; i < D / 4; ++i) {
    const float2 x = unpack<T>(a.x[i >> 2][i & 3]), y = unpack<T>(b.x[i >> 2][i & 3]);
    sums[i & 1] = fmaf(x.y, y.y, fmaf(x.x, y.x, sums[i & 1]));
  }
}

// What the forward has kept of rows g and g + 8 of a warp's 16 from `row` on.
template <class T, int D, bool ONE_AXIS>
DEVICE void read_stats(const Sequence<T, D, ONE_AXIS>& block, int row, float2 (&stats)[2]) {
  const Problem& p = block.p;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int member = row + (block.lane >> 2) + 8 * half;
    const bool asks = member >= block.asks() && member < p.members;
    const int64_t index = row_index(p, block.at.batch, block.at.head, block.at.group, asks ? member : p.members - 1);
    stats[half] = *reinterpret_cast<const float2*>(p.stats + 2 * index);
  }
}

// Of a warp's 16 queries from `row` on, rows g and g + 8 of each lane: the largest score in units of log2, the factor
// that makes an exponential a probability, and sum(p * dp) times the scale. Kept in p.delta, [B, H, G, M, 4].
template <class T, int D, bool ONE_AXIS>
DEVICE void query_numbers(const Sequence<T, D, ONE_AXIS>& block, int row, const LeftRows<D>& dout,
                          const LeftRows<D>& out, const float2 (&stats)[2], float (&top)[2], float (&factor)[2],
                          float (&delta)[2]) {
  const Problem& p = block.p;
  const Place& at = block.at;
  const int g = block.lane >> 2, t = block.lane & 3;
  delta[0] = delta[1] = 0;
  add_products<T, D>(delta, dout, out);
  if (p.role == kPerGroup && row == 0 && g == 0) {  // row 0 of out is a mean: the group's own is kept
    const float* own = p.kept + part_index(p, at.batch, at.head, at.group) * D + 2 * t;
    delta[0] = 0;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const float2 x = unpack<T>(dout.x[c >> 1][2 * (c & 1)]);
      delta[0] = fmaf(x.y, own[8 * c + 1], fmaf(x.x, own[8 * c], delta[0]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int member = row + g + 8 * half;
    const bool asks = member >= block.asks() && member < p.members;
    const int64_t index = row_index(p, at.batch, at.head, at.group, asks ? member : p.members - 1);
    top[half] = log2_top(stats[half].x), factor[half] = reciprocal(stats[half].y);
    delta[half] = quad_sum(delta[half]) * p.scale;
    // What a group counts for in the class row's output is a factor of that row's dout.
    if (p.role == kPerGroup && member == 0) factor[half] *= class_share(p, at.batch, at.group);
    if (t == 0 && asks)
      *reinterpret_cast<float4*>(p.delta + 4 * index) = make_float4(top[half], factor[half], delta[half], 0);
  }
}

// dq and what query_numbers() keeps
template <class T, int D>
__global__ void __launch_bounds__(32 * stream_warps(D, true), 2)
    streaming_queries_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kTiles = stream_tiles(D);
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks);
  const Place& at = block.at;
  const int row = 16 * kTiles * (at.tile * block.warps + block.warp);
  if (p.role == kNoMember) block.zero(p.dq);
  LeftRows<D> q[kTiles], dout[kTiles];
  float top[kTiles][2], factor[kTiles][2], delta[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    block.load(q[i], p.q, row + 16 * i, block.asks());
    block.load(dout[i], p.dout, row + 16 * i, block.asks());
    LeftRows<D> out;
    float2 stats[2];
    block.load(out, p.out, row + 16 * i, block.asks());
    read_stats(block, row + 16 * i, stats);
    query_numbers(block, row + 16 * i, dout[i], out, stats, top[i], factor[i], delta[i]);
  }

  float dq[kTiles][D / 8][4] = {};
  const Stream<T, D> keys{block, shared, p.k, p.v, 0};
  keys.run([](int, int) {},
           [&](int turn, int first) {
             if (row >= block.rows) return;
#pragma unroll 1
             for (int key = 0; key < kStreamRows && first + key < block.rows; key += 16) {
               float s[kTiles][1][2][4], dp[kTiles][1][2][4];
               inner_rows<T, D>(s, 0, q, keys.at(turn, 0), key);
               inner_rows<T, D>(dp, 0, dout, keys.at(turn, 1), key);
#pragma unroll
               for (int i = 0; i < kTiles; ++i) {
                 stream_scores(p, s[i][0], p.scale * kLog2e, at.group, row + 16 * i, first + key, block.lane);
#pragma unroll
                 for (int j = 0; j < 8; ++j) {
                   const int half = j >> 1 & 1;
                   float& x = s[i][0][j >> 2][j & 3];
                   x = ex2(x - top[i][half]) * factor[i][half] *
                       fmaf(dp[i][0][j >> 2][j & 3], p.scale, -delta[i][half]);
                 }
               }
               mix_rows<T, D>(dq, s, 0, keys.at(turn, 0), key);
             }
           });
  if (row >= block.rows) return;
  float* part = p.role < kPerGroup ? nullptr : p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) block.store(p.dq, row + 16 * i, dq[i], kOnes, block.asks(), part);
}

// dk and dv, after the kernel of the queries.
template <class T, int D>
__global__ void __launch_bounds__(32 * stream_warps(D, true), 2)
    streaming_keys_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kTiles = stream_tiles(D);
  constexpr bool kHoldKeys = D <= 64;  // in registers
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks);
  const Place& at = block.at;
  const int t = block.lane & 3, tile = 16 * kTiles, row = tile * (at.tile * block.warps + block.warp);
  const int owned = tile * block.warps;
  T *values = shared + 4 * kStreamRows * D, *keys = values + owned * D;
  float* numbers = reinterpret_cast<float*>(keys + (kHoldKeys ? 0 : owned * D));  // [2][kStreamRows][3]
  if (p.role == kNoMember) block.zero(p.dk), block.zero(p.dv);
  block.fetch(values, p.v, owned * at.tile, owned, 0, kHoldKeys ? nullptr : keys, &p.k);  // land with the first queries
  const T *own_values = values + tile * block.warp * D, *own_keys = keys + tile * block.warp * D;
  LeftRows<D> k[kTiles];
  if constexpr (kHoldKeys)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) block.load(k[i], p.k, row + 16 * i, 0);
  float dk[kTiles][D / 8][4] = {}, dv[kTiles][D / 8][4] = {};
  const Stream<T, D> queries{block, shared, p.q, p.dout, block.asks()};
  const auto none = [&](int member) { return member < block.asks() || member >= p.members; };
  const auto ready = [&](int turn, int query) {
    const float* from = p.delta + 4 * row_index(p, at.batch, at.head, at.group, query);
    for (int i = threadIdx.x; i < 3 * kStreamRows; i += blockDim.x)
      numbers[3 * kStreamRows * turn + i] = none(query + i / 3) ? 0.0f : from[i / 3 * 4 + i % 3];
  };
  queries.run(ready, [&](int turn, int first) {
    if (row >= block.rows) return;
#pragma unroll 1
    for (int query = 0; query < kStreamRows && first + query < block.rows; query += 16) {
      const float* of = numbers + 3 * (turn * kStreamRows + query + 2 * t);
      // The first and the last 16 may have some that are no queries.
      const bool edge = first + query == 0 || first + query + 16 > p.members;
      float s[kTiles][1][2][4], dp[kTiles][1][2][4];
      if constexpr (kHoldKeys)
        inner_rows<T, D>(s, 0, k, queries.at(turn, 0), query);
      else
        inner_shared<T, D>(s, 0, own_keys, queries.at(turn, 0), query);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * (j >> 1) + (j & 1);
        const float top = of[3 * column], factor = of[3 * column + 1];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          float& x = s[i >> 1][0][j >> 1][2 * (i & 1) + (j & 1)];
          x = ex2(x * (p.scale * kLog2e) - top) * factor;
          if (edge && none(first + query + column + 2 * t)) x = 0;
        }
      }
      if (p.role == kGlobal && at.group > 0 && row == 0 && first + query == 0 && block.lane == 0) s[0][0][0][0] = 0;
      mix_rows<T, D>(dv, s, 0, queries.at(turn, 1), query);
      inner_shared<T, D>(dp, 0, own_values, queries.at(turn, 1), query);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * (j >> 1) + (j & 1);
        const float delta = of[3 * column + 2];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          float &x = s[i >> 1][0][j >> 1][2 * (i & 1) + (j & 1)], &y = dp[i >> 1][0][j >> 1][2 * (i & 1) + (j & 1)];
          x *= fmaf(y, p.scale, -delta);
        }
      }
      mix_rows<T, D>(dk, s, 0, queries.at(turn, 0), query);
    }
  });
  if (row >= block.rows) return;
  float* part = p.role == kNoMember ? nullptr : p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    block.store(p.dk, row + 16 * i, dk[i], kOnes, 0, part ? part + D : nullptr);
    block.store(p.dv, row + 16 * i, dv[i], kOnes, 0, part ? part + 2 * D : nullptr);
  }
}

// --- host ----------------------------------------------------------------------------------------------------------

template <class T, int D, bool KEYS>
int32_t launch_streaming_backward(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr auto kernel = KEYS ? streaming_keys_kernel<T, D> : streaming_queries_kernel<T, D>;
  const char* name = KEYS ? "streaming_backward_keys" : "streaming_backward_queries";
  if (int32_t status = allow_shared(kernel, name, allowed)) return status;
  const int warps = streaming_warps(p, true);
  const int owned = KEYS ? 16 * stream_tiles(D) * warps * (D > 64 ? 2 : 1) : 0,
            numbers = KEYS ? 2 * 3 * kStreamRows : 0;
  const int bytes = (4 * kStreamRows + owned) * D * int(sizeof(T)) + numbers * int(sizeof(float));
  const Blocks blocks(p.batch, p.groups, streaming_tiles(p, true), p.heads);
  return launch(name, kernel, p, blocks, 32 * warps, bytes, stream);
}

template <class T>
int32_t streaming_backward(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) {
    if (int32_t status = launch_streaming_backward<T, D(), false>(p, stream)) return status;
    return launch_streaming_backward<T, D(), true>(p, stream);
  });
}

}  // namespace tsk
