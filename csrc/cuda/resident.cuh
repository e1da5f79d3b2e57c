// SPDX-License-Identifier: Apache-2.0
// Sequences of 17 to 256 members, a block for each and each head: space attention at 224 px, time attention of many
// frames. Two of its tensors lie in shared memory whole, read from global memory once; a warp has 16 rows at a time.
//
//   forward:   keys and values lie there, a warp has queries.
//   backward:  the same, and each row's maximum, sum and sum(p * dp) are found, then dq. After that queries and dout
//              take the place of keys and values, a warp has keys, and dk and dv are summed over the queries.
// So every sum has one writer: no atomics, the same bits at every run, and nothing is needed of the forward.
#pragma once
#include "rows.cuh"

namespace tsk {

constexpr int kResidentMembers = 256;

// --- kernels -------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, 1)
    resident_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kSteps = 4;  // of 16 keys, between two corrections of the sums
  SHARED_DYN(T, shared);
  const int rows = (p.members + 15) / 16 * 16;
  T *keys = shared, *values = keys + rows * D;
  const Sequence<T, D> block(p, blocks, values + rows * D);
  const int t = block.lane & 3;
  block.fetch(keys, p.k, 0, rows, 0);
  block.fetch(values, p.v, 0, rows, 0);
  cp_async_commit();
  if (p.role <= kKey) block.zero(p.out);

  LeftRows<D> q;
  block.load(q, p.q, 16 * block.warp, block.asks());
  __syncthreads();
  for (int row = 16 * block.warp; row < rows; row += 16 * block.warps) {
    if (row != 16 * block.warp) block.load(q, p.q, row, block.asks());
    RowSums sums;
    float acc[D / 8][4] = {};
    for (int key = 0; key < rows; key += 16 * kSteps) {
      float s[kSteps][2][4], shrink[2];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (key + 16 * i < rows) inner_rows<T, D>(s[i], q, keys, key + 16 * i);
        scale_scores(s[i], p.scale * kLog2e, key + 16 * i, p.members, t);
      }
      sums.add(s, s, false, shrink);
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][i] *= shrink[i >> 1];
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (key + 16 * i < rows) mix_rows<T, D>(acc, s[i], values, key + 16 * i);
    }
    finish_forward(block, row, sums, acc);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, 1)
    resident_backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kSteps = 2;
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const int rows = (p.members + 15) / 16 * 16;
  T *first = shared, *second = first + rows * D;
  const Sequence<T, D> block(p, blocks, second + rows * D);
  const Place& at = block.at;
  const int g = block.lane >> 2, t = block.lane & 3;
  float* tops = reinterpret_cast<float*>(second + rows * D + block.warps * 16 * D);
  float *factors = tops + rows, *deltas = factors + rows;
  const float scale = p.scale * kLog2e;
  float* parts = p.role == kNoMember ? nullptr : p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
  block.fetch(first, p.k, 0, rows, 0);
  block.fetch(second, p.v, 0, rows, 0);
  cp_async_commit();
  cp_async_wait<0>();
  if (p.role == kNoMember) block.zero(p.dq), block.zero(p.dk), block.zero(p.dv);
  __syncthreads();

  for (int row = 16 * block.warp; row < rows; row += 16 * block.warps) {
    LeftRows<D> q, dout;
    block.load(q, p.q, row, block.asks());
    block.load(dout, p.dout, row, block.asks());
    RowSums sums;
    for (int key = 0; key < rows; key += 16 * kSteps) {
      float s[kSteps][2][4], dp[kSteps][2][4] = {}, shrink[2];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (key + 16 * i < rows) {
          inner_rows<T, D>(s[i], q, first, key + 16 * i);
          inner_rows<T, D>(dp[i], dout, second, key + 16 * i);
        }
        scale_scores(s[i], scale, key + 16 * i, p.members, t);
      }
      sums.add(s, dp, true, shrink);
    }
    float factor[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sums.total[half]);
      const int member = row + g + 8 * half;
      const bool asks = member >= block.asks() && member < p.members;
      factor[half] = reciprocal(total), delta[half] = quad_sum(sums.dot[half]) * factor[half];
      // What a group counts for in the class row's output is a factor of that row's dout.
      if (p.role == kPerGroup && member == 0) factor[half] *= class_share(p, at.batch, at.group);
      if (t == 0) {  // a query that is none has probability 2^-inf of every key
        tops[member] = asks ? sums.top[half] : INFINITY;
        factors[member] = asks ? factor[half] : 0.0f, deltas[member] = asks ? delta[half] : 0.0f;
      }
    }
    float acc[D / 8][4] = {};
    for (int key = 0; key < rows; key += 16) {
      float s[2][4], dp[2][4];
      inner_rows<T, D>(s, q, first, key);
      inner_rows<T, D>(dp, dout, second, key);
      scale_scores(s, scale, key, p.members, t);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i >> 2, j = i & 3, half = j >> 1;
        s[n][j] = ex2(s[n][j] - sums.top[half]) * factor[half] * p.scale * (dp[n][j] - delta[half]);
      }
      mix_rows<T, D>(acc, s, first, key);
    }
    block.store(p.dq, row, acc, kOnes, block.asks(), p.role == kPerGroup ? parts : nullptr);
  }
  __syncthreads();  // nobody looks at keys and values any more

  block.fetch(first, p.q, 0, rows, block.asks());
  block.fetch(second, p.dout, 0, rows, block.asks());
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int row = 16 * block.warp; row < rows; row += 16 * block.warps) {
    LeftRows<D> k, v;
    block.load(k, p.k, row, 0);
    block.load(v, p.v, row, 0);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    for (int query = 0; query < rows; query += 16) {
      float s[2][4], dp[2][4];
      inner_rows<T, D>(s, k, first, query);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i >> 2, j = i & 3, column = query + 8 * n + 2 * t + (j & 1);
        s[n][j] = ex2(s[n][j] * scale - tops[column]) * factors[column];
      }
      mix_rows<T, D>(dv, s, second, query);
      if constexpr (D > 64) v.load(block.own);  // again: no room for both in registers
      inner_rows<T, D>(dp, v, second, query);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i >> 2, j = i & 3, column = query + 8 * n + 2 * t + (j & 1);
        s[n][j] *= p.scale * (dp[n][j] - deltas[column]);
      }
      mix_rows<T, D>(dk, s, first, query);
    }
    block.store(p.dk, row, dk, kOnes, 0, parts ? parts + D : nullptr);
    block.store(p.dv, row, dv, kOnes, 0, parts ? parts + 2 * D : nullptr);
  }
}

// --- host ----------------------------------------------------------------------------------------------------------

// Warps of a block: one for each 16 rows, or half as many where that is more than there may be.
inline int resident_warps(const Problem& p) {
  const int tiles = (p.members + 15) / 16;
  return tiles <= kRowWarps ? tiles : (tiles + 1) / 2;
}

inline int resident_bytes(const Problem& p) {
  const int rows = (p.members + 15) / 16 * 16;
  return (2 * rows + 16 * resident_warps(p)) * p.head_dim * 2 + 3 * rows * int(sizeof(float));
}

// Whether these kernels take a call, a backward where p has its tensors.
inline bool resident_serves(const Problem& p) {
  if (p.members <= kRowTile || p.members > kResidentMembers || p.role == kGlobal || !half_operands(p)) return false;
  return resident_bytes(p) <= kRowShared && int64_t(p.batch) * p.groups * p.heads <= INT32_MAX;
}

template <class T, int D, bool BACKWARD>
int32_t launch_resident(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device
  constexpr auto kernel = BACKWARD ? resident_backward_kernel<T, D> : resident_forward_kernel<T, D>;
  const char* name = BACKWARD ? "resident_backward" : "resident_forward";
  if (int32_t status = allow_shared(kernel, name, allowed)) return status;
  return launch(name, kernel, p, Blocks(p.batch, p.groups, 1, p.heads), 32 * resident_warps(p), resident_bytes(p),
                stream);
}

template <class T, bool BACKWARD>
int32_t resident(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) { return launch_resident<T, D(), BACKWARD>(p, stream); });
}

}  // namespace tsk
