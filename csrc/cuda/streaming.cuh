// SPDX-License-Identifier: Apache-2.0
// Sequences too long for one block to hold: space attention at 448 px, joint attention. Also a class row with one
// softmax over all groups, whose backward depends on what the other groups have.
//
// A block has up to 128 rows, 16 to a warp; those that they meet pass by in blocks of 64, the next one on its way while
// one is worked on. Forward: online softmax (FlashAttention-2, arXiv 2307.08691). Backward: a kernel that owns queries
// and leaves what the other needs, then one that owns keys. No atomics: the same bits at every run.
#pragma once
#include "rows.cuh"

namespace tsk {

constexpr int kStreamRows = 64;  // that pass by at a time

// --- what passes by ------------------------------------------------------------------------------------------------

// Two blocks of rows of two tensors in shared memory, [2][2][kStreamRows, D].
template <class T, int D>
struct Stream {
  const Sequence<T, D>& block;
  T* rows;
  const Tensor &first, &second;
  int begin;

  DEVICE T* at(int turn, int which) const { return rows + (2 * turn + which) * kStreamRows * D; }
  DEVICE void start(int turn, int member) const {
    if (member < block.rows) {
      block.fetch(at(turn, 0), first, member, kStreamRows, begin);
      block.fetch(at(turn, 1), second, member, kStreamRows, begin);
    }
    cp_async_commit();
  }
  // step(member, rows of the first, rows of the second) for every 64 members; ready(turn, member) by all threads
  // before.
  template <class Ready, class Step>
  DEVICE void run(Ready ready, Step step) const {
    start(0, 0);
    for (int member = 0, turn = 0; member < block.rows; member += kStreamRows, turn ^= 1) {
      start(turn ^ 1, member + kStreamRows);
      cp_async_wait<1>();
      ready(turn, member);
      __syncthreads();
      step(turn, member);
      __syncthreads();  // the next copy but one comes where these rows are
    }
  }
};

// Scores of 16 keys in units of log2, and -inf for those that do not exist, or that row 0 does not count: the one
// softmax of a global class row has the class key once.
DEVICE void stream_scores(const Problem& p, float (&s)[2][4], float scale, int group, int row, int key, int lane) {
  scale_scores(s, scale, key, p.members, lane & 3);
  if (p.role == kGlobal && group > 0 && row == 0 && key == 0 && lane == 0) s[0][0] = -INFINITY;
}

// --- kernels -------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, 1)
    streaming_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kSteps = 4;
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks, shared + 4 * kStreamRows * D);
  const Place& at = block.at;
  const int row = 16 * (at.tile * block.warps + block.warp);
  if (p.role <= kKey) block.zero(p.out);
  LeftRows<D> q;
  block.load(q, p.q, row, block.asks());
  RowSums sums;
  float acc[D / 8][4] = {};
  const Stream<T, D> keys{block, shared, p.k, p.v, 0};
  keys.run([](int, int) {},
           [&](int turn, int key) {
             if (row >= block.rows) return;
             float s[kSteps][2][4], shrink[2];
#pragma unroll
             for (int i = 0; i < kSteps; ++i) {
               inner_rows<T, D>(s[i], q, keys.at(turn, 0), 16 * i);
               stream_scores(p, s[i], p.scale * kLog2e, at.group, row, key + 16 * i, block.lane);
             }
             sums.add(s, s, false, shrink);
#pragma unroll
             for (int c = 0; c < D / 8; ++c)
#pragma unroll
               for (int i = 0; i < 4; ++i) acc[c][i] *= shrink[i >> 1];
#pragma unroll
             for (int i = 0; i < kSteps; ++i) mix_rows<T, D>(acc, s[i], keys.at(turn, 1), 16 * i);
           });
  if (row >= block.rows) return;
  finish_forward(block, row, sums, acc);
}

// dq, and in p.delta, [B, H, G, M, 3], the largest score in units of log2, the factor that makes an exponential a
// probability, and sum(p * dp) of every query.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, 1)
    streaming_queries_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kSteps = 2;
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks, shared + 4 * kStreamRows * D);
  const Place& at = block.at;
  const int g = block.lane >> 2, t = block.lane & 3, row = 16 * (at.tile * block.warps + block.warp);
  const float scale = p.scale * kLog2e;
  if (p.role == kNoMember) block.zero(p.dq);
  LeftRows<D> q, dout;
  block.load(q, p.q, row, block.asks());
  block.load(dout, p.dout, row, block.asks());
  const Stream<T, D> keys{block, shared, p.k, p.v, 0};
  RowSums sums;
  keys.run([](int, int) {},
           [&](int turn, int key) {
             if (row >= block.rows) return;
#pragma unroll 1
             for (int j = 0; j < kStreamRows; j += 16 * kSteps) {
               float s[kSteps][2][4], dp[kSteps][2][4], shrink[2];
#pragma unroll
               for (int i = 0; i < kSteps; ++i) {
                 inner_rows<T, D>(s[i], q, keys.at(turn, 0), j + 16 * i);
                 inner_rows<T, D>(dp[i], dout, keys.at(turn, 1), j + 16 * i);
                 stream_scores(p, s[i], scale, at.group, row, key + j + 16 * i, block.lane);
               }
               sums.add(s, dp, true, shrink);
             }
           });

  float top[2], factor[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int member = row + g + 8 * half;
    const float total = quad_sum(sums.total[half]), dot = quad_sum(sums.dot[half]);
    top[half] = sums.top[half], factor[half] = reciprocal(total), delta[half] = dot * factor[half];
    if (member >= p.members) continue;
    if (p.role == kGlobal && member == 0) {  // over all groups: the forward's sums, and the product with what came out
      const float* from = p.stats + 2 * row_index(p, at.batch, at.head, at.group, 0);
      top[half] = from[0] * kLog2e, factor[half] = reciprocal(from[1]), delta[half] = 0;
      const T *out = block.head(p.out), *gradient = block.head(p.dout);
      for (int d = 0; d < D; ++d) delta[half] = fmaf(to_float(out[d]), to_float(gradient[d]), delta[half]);
    }
    // What a group counts for in the class row's output is a factor of that row's dout.
    if (p.role == kPerGroup && member == 0) factor[half] *= class_share(p, at.batch, at.group);
    if (t != 0) continue;
    float* to = p.delta + 3 * row_index(p, at.batch, at.head, at.group, member);
    const bool asks = member >= block.asks();  // a query that is none has probability 2^-inf of every key
    to[0] = asks ? top[half] : INFINITY, to[1] = asks ? factor[half] : 0.0f, to[2] = asks ? delta[half] : 0.0f;
  }

  float dq[D / 8][4] = {};
  keys.run([](int, int) {},
           [&](int turn, int key) {
             if (row >= block.rows) return;
#pragma unroll 1
             for (int j = 0; j < kStreamRows; j += 16) {
               float s[2][4], dp[2][4];
               inner_rows<T, D>(s, q, keys.at(turn, 0), j);
               inner_rows<T, D>(dp, dout, keys.at(turn, 1), j);
               stream_scores(p, s, scale, at.group, row, key + j, block.lane);
#pragma unroll
               for (int i = 0; i < 8; ++i) {
                 const int n = i >> 2, half = i >> 1 & 1;
                 s[n][i & 3] = ex2(s[n][i & 3] - top[half]) * factor[half] * p.scale * (dp[n][i & 3] - delta[half]);
               }
               mix_rows<T, D>(dq, s, keys.at(turn, 0), j);
             }
           });
  if (row >= block.rows) return;
  float* part = p.role < kPerGroup ? nullptr : p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
  block.store(p.dq, row, dq, kOnes, block.asks(), part);
}

// dk and dv, after the kernel of the queries.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, 1)
    streaming_keys_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  SHARED(float, numbers, [2][3][kStreamRows]);
  const Sequence<T, D> block(p, blocks, shared + 4 * kStreamRows * D);
  const Place& at = block.at;
  const int t = block.lane & 3, row = 16 * (at.tile * block.warps + block.warp);
  if (p.role == kNoMember) block.zero(p.dk), block.zero(p.dv);
  LeftRows<D> k, v;
  block.load(k, p.k, row, 0);
  block.load(v, p.v, row, 0);
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  const Stream<T, D> queries{block, shared, p.q, p.dout, block.asks()};
  const auto ready = [&](int turn, int query) {
    const float* from = p.delta + 3 * row_index(p, at.batch, at.head, at.group, query);
    for (int i = threadIdx.x; i < kStreamRows; i += blockDim.x)
#pragma unroll
      for (int j = 0; j < 3; ++j)
        numbers[turn][j][i] = query + i < p.members && query + i >= block.asks() ? from[3 * i + j]
                              : j                                                ? 0.0f
                                                                                 : INFINITY;
  };
  queries.run(ready, [&](int turn, int query) {
    if (row >= block.rows) return;
#pragma unroll 1
    for (int j = 0; j < kStreamRows; j += 16) {
      float s[2][4], dp[2][4];
      inner_rows<T, D>(s, k, queries.at(turn, 0), j);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i >> 2, column = j + 8 * n + 2 * t + (i & 1);
        s[n][i & 3] = ex2(s[n][i & 3] * p.scale * kLog2e - numbers[turn][0][column]) * numbers[turn][1][column];
      }
      if (p.role == kGlobal && at.group > 0 && row == 0 && query + j == 0 && block.lane == 0) s[0][0] = 0;
      mix_rows<T, D>(dv, s, queries.at(turn, 1), j);
      if constexpr (D > 64) v.load(block.own);  // again: no room for both in registers
      inner_rows<T, D>(dp, v, queries.at(turn, 1), j);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i >> 2, column = j + 8 * n + 2 * t + (i & 1);
        s[n][i & 3] *= p.scale * (dp[n][i & 3] - numbers[turn][2][column]);
      }
      mix_rows<T, D>(dk, s, queries.at(turn, 0), j);
    }
  });
  if (row >= block.rows) return;
  float* part = p.role == kNoMember ? nullptr : p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
  block.store(p.dk, row, dk, kOnes, 0, part ? part + D : nullptr);
  block.store(p.dv, row, dv, kOnes, 0, part ? part + 2 * D : nullptr);
}

// --- host ----------------------------------------------------------------------------------------------------------

// Warps of a block: as few tiles of 16 rows too many as can be, and of such numbers the largest.
inline int streaming_warps(const Problem& p) {
  const int tiles = (p.members + 15) / 16;
  int best = 1, waste = 0;
  for (int warps = tiles < kRowWarps ? tiles : kRowWarps; warps > 0; --warps) {
    const int over = (tiles + warps - 1) / warps * warps - tiles;
    if (warps < kRowWarps / 2 && tiles > warps) break;  // small blocks read the same keys too often
    if (best == 1 || over < waste) best = warps, waste = over;
  }
  return best;
}

inline int64_t streaming_blocks(const Problem& p) {
  const int rows = 16 * streaming_warps(p);
  return int64_t(p.batch) * p.groups * p.heads * ((p.members + rows - 1) / rows);
}

// Whether these kernels take a call, a backward where p has its tensors.
inline bool streaming_serves(const Problem& p) {
  return p.members > kRowTile && half_operands(p) && streaming_blocks(p) <= INT32_MAX;
}

template <class T, int D, int KERNEL>
int32_t queue_streaming(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr auto kernel = KERNEL == 0   ? streaming_forward_kernel<T, D>
                          : KERNEL == 1 ? streaming_queries_kernel<T, D>
                                        : streaming_keys_kernel<T, D>;
  const char* names[] = {"streaming_forward", "streaming_backward_queries", "streaming_backward_keys"};
  if (int32_t status = allow_shared(kernel, names[KERNEL], allowed)) return status;
  const int warps = streaming_warps(p), tiles = (p.members + 16 * warps - 1) / (16 * warps);
  const int bytes = (4 * kStreamRows + 16 * warps) * D * int(sizeof(T));
  return launch(names[KERNEL], kernel, p, Blocks(p.batch, p.groups, tiles, p.heads), 32 * warps, bytes, stream);
}

template <class T, int D, bool BACKWARD>
int32_t launch_streaming(const Problem& p, cudaStream_t stream) {
  if constexpr (!BACKWARD) return queue_streaming<T, D, 0>(p, stream);
  if (int32_t status = queue_streaming<T, D, 1>(p, stream)) return status;
  return queue_streaming<T, D, 2>(p, stream);
}

template <class T, bool BACKWARD>
int32_t streaming(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) { return launch_streaming<T, D(), BACKWARD>(p, stream); });
}

}  // namespace tsk
