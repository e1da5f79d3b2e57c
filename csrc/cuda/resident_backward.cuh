// SPDX-License-Identifier: Apache-2.0
// Backward of the sequences that a block holds whole (resident.cuh): five products, each element of q, k, v and dout
// read once and of dq, dk and dv written once, no atomics, nothing needed of the forward.
//
// A warp owns 16 keys, with dk and dv in registers, and the block walks over tiles of queries:
//   s^T = k q^T and dp^T = v dout^T of its keys; relative to their largest score m, the sums l of e = exp(s - m) and d
//   of e dp over its keys. (m, l, d) of every query goes to shared memory for the others: one barrier.
//   Each warp puts all warps' triples together, in the same order: p = e exp(m - max) / sum, delta, ds = p (dp -
//   delta). dv += p^T dout, dk += ds^T q: what a product leaves is a left operand of the next. ds goes to shared
//   memory, and after the next tile's barrier dq = ds k is divided among the warps.
#pragma once
#include "resident.cuh"

namespace tsk {

constexpr int kWalkBuffers = 3;  // of tiles: one in use, one there, one on its way

// Queries of a tile.
EVERYWHERE constexpr int walk_queries(int head_dim) { return head_dim == 32 ? 32 : 16; }
// Warps of a block, at most.
EVERYWHERE constexpr int walk_warps(int head_dim) {
  return (head_dim > 64 ? kResidentMembersWide : kResidentMembers) / 16;
}

// x of the eight lanes that share a column of s^T combined, four columns at once: each lane gets one of them, that of
// number 2 * (lane bit 4) + (lane bit 3).
template <class Combine>
DEVICE float scatter_columns(const float (&x)[4], Combine combine) {
  const bool high = threadIdx.x & 16, odd = threadIdx.x & 8;
  const float a = combine(high ? x[2] : x[0], __shfl_xor_sync(~0u, high ? x[0] : x[2], 16));
  const float b = combine(high ? x[3] : x[1], __shfl_xor_sync(~0u, high ? x[1] : x[3], 16));
  const float one = combine(odd ? b : a, __shfl_xor_sync(~0u, odd ? a : b, 8));
  return combine(one, __shfl_xor_sync(~0u, one, 4));
}

template <class T, int D>
__global__ void __launch_bounds__(32 * walk_warps(D), 1)
    resident_backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kQueries = walk_queries(D), kSteps = kQueries / 16, kBuffers = kWalkBuffers;
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks);
  const Place& at = block.at;
  const int lane = block.lane, warp = block.warp, g = lane >> 2, t = lane & 3, rows = block.rows;
  T *keys = shared, *values = keys + rows * D, *tiles = values + rows * D, *ds = tiles + kBuffers * 2 * kQueries * D;
  float2* sums = reinterpret_cast<float2*>(ds + 2 * rows * kQueries);         // [2][warps][kQueries] of e and of e dp
  float* tops = reinterpret_cast<float*>(sums + 2 * block.warps * kQueries);  // [2][warps][kQueries]
  // Where what the group has of the class row's gradient `which` goes
  const auto part_of = [&](int which) {
    return p.parts + (3 * part_index(p, at.batch, at.head, at.group) + which) * D;
  };
  const auto fetch_tile = [&](int query, int buffer) {
    T* to = tiles + buffer * 2 * kQueries * D;
    if (query < rows) block.fetch(to, p.q, query, kQueries, block.asks(), to + kQueries * D, &p.dout);
    cp_async_commit();
  };
  // dq of the tile of queries from `query` on, whose ds are there
  const auto finish = [&](int query, const T* ds) {
    for (int unit = warp; unit < kSteps * (D / 16); unit += block.warps) {
      const int step = unit % kSteps, c = 2 * (unit / kSteps);
      float dq[2][4] = {};
      for (int key = 0; key < rows; key += 16) {
        uint32_t a[4], b[4];
        ldmatrix<4, true>(a, chunk_of<kQueries>(ds, key + (lane >> 4) * 8 + (lane & 7), 2 * step + (lane >> 3 & 1)));
        ldmatrix<4, true>(b, chunk_of<D>(keys, key + (lane & 15), c + (lane >> 4)));
        mma<T>(dq[0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma<T>(dq[1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
      uint32_t y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = pack<T>(dq[i & 1][i & 2], dq[i & 1][(i & 2) + 1]);
      quad_transpose(y);  // one of the four chunks to each lane
      const int first = query + 16 * step, member = first + g + 8 * (t >> 1);
      const bool part = p.role == kPerGroup && first == 0;
      if (member >= block.asks() && member < p.members && !(part && member == 0))
        store16(
            row_of(head_of<T>(p.dq, at.batch, at.head), p.dq, member_row(p, block.start, member)) + 8 * (c + (t & 1)),
            make_uint4(y[0], y[1], y[2], y[3]));
      if (part && g == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) part_of(0)[8 * (c + (i >> 1)) + 2 * t + (i & 1)] = dq[i >> 1][i & 1];
    }
  };

  block.fetch(keys, p.k, 0, rows, 0, values, &p.v);
  fetch_tile(0, 0);
  fetch_tile(kQueries, 1);
  if (p.role == kNoMember) block.zero(p.dq), block.zero(p.dk), block.zero(p.dv);
  cp_async_wait<1>();
  __syncthreads();
  const T *own_keys = keys + 16 * warp * D, *own_values = values + 16 * warp * D;
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  int buffer = 0, turn = 0;
  for (int query = 0; query < rows; query += kQueries, turn ^= 1) {
    const T *q = tiles + buffer * 2 * kQueries * D, *dout = q + kQueries * D;
    float s[1][kSteps][2][4], dp[1][kSteps][2][4];
    const int told = turn * block.warps * kQueries;  // what the warps tell each other of this tile
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      inner_shared<T, D>(s, j, own_keys, q, 16 * j);
      inner_shared<T, D>(dp, j, own_values, dout, 16 * j);
      float most[4], total[4], dot[4];  // of columns 2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float none = 16 * warp + g + 8 * (i >> 1 & 1) < p.members ? 0.0f : -INFINITY;  // a key that is
        s[0][j][i >> 2][i & 3] = fmaf(s[0][j][i >> 2][i & 3], p.scale * kLog2e, none);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) most[i] = fmaxf(s[0][j][i >> 1][i & 1], s[0][j][i >> 1][2 + (i & 1)]);
      const float top = scatter_columns(most, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float all = __shfl_sync(~0u, top, 16 * (i >> 1) + 8 * (i & 1) + t);
        const float zero = all == -INFINITY ? 0.0f : all;
        float &low = s[0][j][i >> 1][i & 1], &high = s[0][j][i >> 1][2 + (i & 1)];
        low = ex2(low - zero), high = ex2(high - zero);
        total[i] = low + high, dot[i] = fmaf(low, dp[0][j][i >> 1][i & 1], high * dp[0][j][i >> 1][2 + (i & 1)]);
      }
      const auto plus = [](float a, float b) { return a + b; };
      const float2 sum = make_float2(scatter_columns(total, plus), scatter_columns(dot, plus));
      if (!(g & 1)) {
        const int to = told + warp * kQueries + 16 * j + 8 * (g >> 2) + 2 * t + (g >> 1 & 1);
        tops[to] = top, sums[to] = sum;
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // triples of this tile, ds of the one before, queries of the next
    fetch_tile(query + 2 * kQueries, buffer == 0 ? kBuffers - 1 : buffer - 1);

    // A lane puts together one query's triples, of every second warp where there are 16 queries.
    const int asking = query + lane % kQueries, from = told + lane % kQueries;
    float top = -INFINITY, total = 0, dot = 0;
    for (int w = lane / kQueries; w < block.warps; w += 32 / kQueries) top = fmaxf(top, tops[from + w * kQueries]);
    if constexpr (kQueries == 16) top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
    for (int w = lane / kQueries; w < block.warps; w += 32 / kQueries) {
      const float share = ex2(tops[from + w * kQueries] - top);
      const float2 sum = sums[from + w * kQueries];
      total = fmaf(sum.x, share, total), dot = fmaf(sum.y, share, dot);
    }
    if constexpr (kQueries == 16) {
      total += __shfl_xor_sync(~0u, total, 16);
      dot += __shfl_xor_sync(~0u, dot, 16);
    }
    const float inverse = reciprocal(total), delta = dot * inverse * p.scale;
    float factor = ex2(tops[from + warp * kQueries] - top) * inverse;
    // What a group counts for in the class row's output is a factor of that row's dout.
    if (p.role == kPerGroup && asking == 0) factor *= class_share(p, at.batch, at.group);
    const bool asks = asking >= block.asks() && asking < p.members;
    const uint32_t all = __ballot_sync(~0u, asks);

#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 16 * j + 8 * (i >> 1) + 2 * t + (i & 1);
        const float x = __shfl_sync(~0u, factor, column), y = __shfl_sync(~0u, delta, column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &e = s[0][j][i >> 1][2 * half + (i & 1)], &d = dp[0][j][i >> 1][2 * half + (i & 1)];
          e *= x, d = e * fmaf(d, p.scale, -y);
          if (all != ~0u && !(all >> column & 1)) e = d = 0;  // a query that is none
        }
      }
      uint32_t w[1][4];
      pack_weights<T>(w[0], s[0][j]);
      mix_packed<T, D>(dv, w, dout, 16 * j);
      pack_weights<T>(w[0], dp[0][j]);
      mix_packed<T, D>(dk, w, q, 16 * j);
      T* to = ds + turn * rows * kQueries;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<uint32_t*>(chunk_of<kQueries>(to, 16 * warp + g + 8 * (i & 1), 2 * j + (i >> 1)))[t] = w[0][i];
    }
    if (query > 0) finish(query - kQueries, ds + (turn ^ 1) * rows * kQueries);
    buffer = buffer == kBuffers - 1 ? 0 : buffer + 1;
  }
  __syncthreads();
  finish((rows - 1) / kQueries * kQueries, ds + (turn ^ 1) * rows * kQueries);
  block.store(p.dk, 16 * warp, dk[0], kOnes, 0, p.role == kNoMember ? nullptr : part_of(1));
  block.store(p.dv, 16 * warp, dv[0], kOnes, 0, p.role == kNoMember ? nullptr : part_of(2));
}

// --- host ----------------------------------------------------------------------------------------------------------

template <class T, int D>
int32_t launch_resident_backward(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr auto kernel = resident_backward_kernel<T, D>;
  if (int32_t status = allow_shared(kernel, "resident_backward", allowed)) return status;
  constexpr int kQueries = walk_queries(D);
  const int warps = (p.members + 15) / 16, rows = 16 * warps;
  const int elements = 2 * rows * D + kWalkBuffers * 2 * kQueries * D + 2 * rows * kQueries;
  const int bytes = elements * int(sizeof(T)) + 2 * warps * kQueries * 3 * int(sizeof(float));
  return launch("resident_backward", kernel, p, Blocks(p.batch, p.groups, 1, p.heads), 32 * warps, bytes, stream);
}

template <class T>
int32_t resident_backward(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) { return launch_resident_backward<T, D()>(p, stream); });
}

}  // namespace tsk
