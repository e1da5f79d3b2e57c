// SPDX-License-Identifier: Apache-2.0
// Sequences too long for one block to hold: space attention at 448 px, joint attention. Also a class row with one
// softmax over all groups, whose backward depends on what the other groups have.
//
// A warp has 32 rows (16 where head_dim is 128); those that they meet pass by in blocks of 64, the next one on its way
// while one is worked on. Forward: online softmax (FlashAttention-2, arXiv 2307.08691). streaming_backward.cuh is the
// other half.
#pragma once
#include "rows.cuh"

namespace tsk {

constexpr int kStreamRows = 64;  // that pass by at a time

// Tiles of 16 rows that a warp has.
EVERYWHERE constexpr int stream_tiles(int head_dim) { return head_dim > 64 ? 1 : 2; }
// Warps of a block at most: of the forward so many that two blocks have room beside one another, of the backward one
// fewer for each register it needs more.
EVERYWHERE constexpr int stream_warps(int head_dim, bool backward) { return backward || head_dim > 64 ? 4 : 6; }

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
    if (member < block.rows) block.fetch(at(turn, 0), first, member, kStreamRows, begin, at(turn, 1), &second);
    cp_async_commit();
  }
  // step(turn, member) for every 64 members; ready(turn, member) by all threads before.
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

// --- forward -------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(32 * stream_warps(D, false), 2)
    streaming_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kTiles = stream_tiles(D), kSteps = kTiles == 2 ? 1 : 4;
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks);
  const Place& at = block.at;
  const int row = 16 * kTiles * (at.tile * block.warps + block.warp);
  if (p.role <= kKey) block.zero(p.out);
  LeftRows<D> q[kTiles];
  RowSums sums[kTiles];
  float acc[kTiles][D / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) block.load(q[i], p.q, row + 16 * i, block.asks());
  const Stream<T, D> keys{block, shared, p.k, p.v, 0};
  keys.run([](int, int) {},
           [&](int turn, int first) {
             if (row >= block.rows) return;
#pragma unroll 1
             for (int key = 0; key < kStreamRows && first + key < block.rows; key += 16 * kSteps) {
               float s[kTiles][kSteps][2][4];
#pragma unroll
               for (int j = 0; j < kSteps; ++j) {
                 inner_rows<T, D>(s, j, q, keys.at(turn, 0), key + 16 * j);
#pragma unroll
                 for (int i = 0; i < kTiles; ++i)
                   stream_scores(p, s[i][j], p.scale * kLog2e, at.group, row + 16 * i, first + key + 16 * j,
                                 block.lane);
               }
               add_scores(sums, s, acc);
#pragma unroll
               for (int j = 0; j < kSteps; ++j) mix_rows<T, D>(acc, s, j, keys.at(turn, 1), key + 16 * j);
             }
           });
  if (row >= block.rows) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) finish_forward(block, row + 16 * i, sums[i], acc[i]);
}

// --- host ----------------------------------------------------------------------------------------------------------

// Warps of a block: as few too many as can be, and of such numbers the largest.
inline int streaming_warps(const Problem& p, bool backward) {
  const int rows = 16 * stream_tiles(p.head_dim), wanted = (p.members + rows - 1) / rows;
  const int most = stream_warps(p.head_dim, backward);
  int best = 0, waste = 0;
  for (int warps = wanted < most ? wanted : most; warps > 0; --warps) {
    const int over = (wanted + warps - 1) / warps * warps - wanted;
    if (best && warps < most / 2 + 1) break;  // small blocks read the same keys too often
    if (!best || over < waste) best = warps, waste = over;
  }
  return best;
}

inline int64_t streaming_tiles(const Problem& p, bool backward) {
  const int rows = 16 * stream_tiles(p.head_dim) * streaming_warps(p, backward);
  return (p.members + rows - 1) / rows;
}

// Whether the shape of a call is one of these kernels'.
inline bool streaming_shape(const Problem& p) {
  if (p.dtype != TSK_BF16 && p.dtype != TSK_F16) return false;
  if (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128) return false;
  return p.members > kRowTile && !holds_sequence(p);
}

// Whether these kernels take a call, a backward where p has its tensors.
inline bool streaming_serves(const Problem& p) {
  const bool backward = p.dq.data;
  if (!streaming_shape(p) || !half_operands(p) || (backward && !rows_aligned(p, p.out))) return false;
  return int64_t(p.batch) * p.groups * p.heads * streaming_tiles(p, backward) <= INT32_MAX;
}

template <class T, int D>
int32_t launch_streaming_forward(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr auto kernel = streaming_forward_kernel<T, D>;
  if (int32_t status = allow_shared(kernel, "streaming_forward", allowed)) return status;
  const Blocks blocks(p.batch, p.groups, streaming_tiles(p, false), p.heads);
  const int bytes = 4 * kStreamRows * D * int(sizeof(T));
  return launch("streaming_forward", kernel, p, blocks, 32 * streaming_warps(p, false), bytes, stream);
}

template <class T>
int32_t streaming_forward(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) { return launch_streaming_forward<T, D()>(p, stream); });
}

}  // namespace tsk
