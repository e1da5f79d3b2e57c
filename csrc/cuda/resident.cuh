// SPDX-License-Identifier: Apache-2.0
// Sequences of 17 to 256 members, a block for each and each head: space attention at 224 px, time attention of many
// frames. Forward: keys and values lie in shared memory whole and are worked on as they arrive. resident_backward.cuh
// is the other half.
//
// A warp has 16 queries. In a sequence of more than 128 it has 32, so that each fragment of keys and values read from
// shared memory serves two products: with one, reading alone takes the time that the memory takes. Two blocks share
// such a sequence; while one waits for its keys another works.
#pragma once
#include "rows.cuh"

namespace tsk {

constexpr int kResidentKeys = 64;     // that arrive together
constexpr int kResidentNarrow = 128;  // members up to which a warp has 16 queries

// Blocks that a multiprocessor is to hold. On 12.x the assembler would spill for the second one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResidentNarrowBlocks = 1;
#else
constexpr int kResidentNarrowBlocks = 2;
#endif
constexpr int resident_blocks(int D, int tiles) { return tiles == 2 ? 3 : D == 128 ? 1 : kResidentNarrowBlocks; }

template <class T, int D, int TILES>
__global__ void __launch_bounds__(TILES == 2 ? 128 : 256, resident_blocks(D, TILES))
    resident_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  constexpr int kSteps = TILES == 2 ? 1 : 4;  // of 16 keys, between two corrections of the sums
  SHARED_DYN(T, shared);
  const Sequence<T, D> block(p, blocks);
  const int t = block.lane & 3, rows = block.rows;
  const int row = 16 * TILES * (block.at.tile * block.warps + block.warp);
  T *keys = shared, *values = keys + rows * D;
#pragma unroll
  for (int first = 0; first < kResidentMembers; first += kResidentKeys) {
    const int count = rows - first < kResidentKeys ? rows - first : kResidentKeys;
    block.fetch(keys + first * D, p.k, first, count, 0, values + first * D, &p.v);
    cp_async_commit();
  }
  if (p.role <= kKey) block.zero(p.out);

  LeftRows<D> q[TILES];
  RowSums sums[TILES];
  float acc[TILES][D / 8][4] = {};
#pragma unroll
  for (int i = 0; i < TILES; ++i) block.load(q[i], p.q, row + 16 * i, block.asks());
  for (int key = 0; key < rows; key += 16 * kSteps) {
    if (key % kResidentKeys == 0) {
      cp_async_wait_for(kResidentMembers / kResidentKeys - 1 - key / kResidentKeys);
      __syncthreads();
    }
    if (row >= rows) continue;  // a warp of the second block may have no query
    float s[TILES][kSteps][2][4];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (key + 16 * j < rows) inner_rows<T, D>(s, j, q, keys, key + 16 * j);
#pragma unroll
      for (int i = 0; i < TILES; ++i) scale_scores(s[i][j], p.scale * kLog2e, key + 16 * j, p.members, t);
    }
    add_scores(sums, s, acc);
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      if (key + 16 * j < rows) mix_rows<T, D>(acc, s, j, values, key + 16 * j);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) finish_forward(block, row + 16 * i, sums[i], acc[i]);
}

// --- host ----------------------------------------------------------------------------------------------------------

// Whether these kernels and those of resident_backward.cuh take a call, a backward where p has its tensors.
inline bool resident_serves(const Problem& p) {
  if (p.members <= kRowTile || !holds_sequence(p) || !half_operands(p)) return false;
  return 2 * int64_t(p.batch) * p.groups * p.heads <= INT32_MAX;
}

template <class T, int D, int TILES>
int32_t launch_resident_forward(const Problem& p, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device
  constexpr auto kernel = resident_forward_kernel<T, D, TILES>;
  if (int32_t status = allow_shared(kernel, "resident_forward", allowed)) return status;
  const int tiles = (p.members + 16 * TILES - 1) / (16 * TILES), warps = (tiles + TILES - 1) / TILES;
  const int bytes = 2 * ((p.members + 15) / 16 * 16) * D * int(sizeof(T));
  return launch("resident_forward", kernel, p, Blocks(p.batch, p.groups, TILES, p.heads), 32 * warps, bytes, stream);
}

template <class T>
int32_t resident_forward(const Problem& p, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) {
    if constexpr (D() <= 64)
      if (p.members > kResidentNarrow) return launch_resident_forward<T, D(), 2>(p, stream);
    return launch_resident_forward<T, D(), 1>(p, stream);
  });
}

}  // namespace tsk
