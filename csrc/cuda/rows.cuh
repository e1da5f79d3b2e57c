// SPDX-License-Identifier: Apache-2.0
// What the kernels of sequences over 16 members share: rows in shared memory, a warp with 16 of them, a softmax whose
// scores come 16 keys at a time.
//
// Rows lie in shared memory as 16-byte chunks, chunk c of row r in place c ^ r (its lowest bits): eight rows of one
// chunk are in eight different groups of four banks, as ldmatrix reads them.
#pragma once
#include <atomic>

#include "matrix.cuh"

namespace tsk {

constexpr int kRowTile = 16;  // rows of a warp; shorter sequences are short.cuh's
constexpr int kRowWarps = 8;  // of a block, at most
constexpr int kRowThreads = 32 * kRowWarps;
constexpr int kRowShared = 99 * 1024;  // bytes a block may have on every architecture

// --- rows in shared memory -----------------------------------------------------------------------------------------

// Where a chunk of 8 elements of a row lies.
template <int D, class T>
DEVICE T* chunk_of(T* rows, int row, int chunk) {
  constexpr int kChunks = D / 8, kMask = kChunks < 8 ? kChunks - 1 : 7;
  const int turn = (kChunks < 8 ? row / (8 / kChunks) : row) & kMask;
  return rows + row * D + 8 * (chunk ^ turn);
}

// Starts the copy of members first to first + count - 1 by `threads` threads, zeros from `end` on and before `begin`.
template <int D, class T>
DEVICE void fetch_rows(T* to, const Problem& p, const Tensor& x, const T* head, int32_t start, int first, int count,
                       int begin, int end, int thread, int threads) {
  for (int i = thread; i < count * (D / 8); i += threads) {
    const int row = i / (D / 8), chunk = i % (D / 8), member = first + row;
    const bool exists = member >= begin && member < end;
    const T* from = row_of(head, x, member_row(p, start, exists ? member : end - 1)) + 8 * chunk;
    cp_async16(chunk_of<D>(to, row, chunk), from, exists ? 16 : 0);
  }
}

// 16 rows as left operands of D / 16 products
template <int D>
struct LeftRows {
  uint32_t x[D / 16][4];

  template <class T>
  DEVICE void load(const T* rows) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ldmatrix<4>(x[k], chunk_of<D>(rows, lane & 15, 2 * k + (lane >> 4)));
  }
};

// sums[n] = left x^T for the rows of x from first + 8 n on
template <class T, int D>
DEVICE void inner_rows(float (&sums)[2][4], const LeftRows<D>& left, const T* x, int first) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    ldmatrix<4>(b, chunk_of<D>(x, first + (lane >> 4) * 8 + (lane & 7), 2 * k + (lane >> 3 & 1)));
    const uint32_t (&a)[4] = left.x[k];
    mma<T>(sums[0], a[0], a[1], a[2], a[3], b[0], b[1]);
    mma<T>(sums[1], a[0], a[1], a[2], a[3], b[2], b[3]);
  }
}

// acc += weights(16 x 16) x for the 16 rows of x from `first` on
template <class T, int D>
DEVICE void mix_rows(float (&acc)[D / 8][4], const float (&weights)[2][4], const T* x, int first) {
  const int lane = threadIdx.x & 31;
  uint32_t w[4], b[4];
  pack_weights<T>(w, weights);
#pragma unroll
  for (int c = 0; c < D / 8; c += 2) {
    ldmatrix<4, true>(b, chunk_of<D>(x, first + (lane & 15), c + (lane >> 4)));
    mma<T>(acc[c], w[0], w[1], w[2], w[3], b[0], b[1]);
    mma<T>(acc[c + 1], w[0], w[1], w[2], w[3], b[2], b[3]);
  }
}

// --- a warp's 16 rows ----------------------------------------------------------------------------------------------

// One head of one sequence, as a warp of its block sees it.
template <class T, int D>
struct Sequence {
  const Problem& p;
  Place at;
  int32_t start;
  int lane, warp, warps, rows;  // rows: M, rounded up to 16
  T* own;                       // 16 rows of this warp in shared memory

  DEVICE Sequence(const Problem& problem, const Blocks& blocks, T* owns) : p(problem) {
    at = place_of(blocks, blockIdx.x), start = group_row(p, at.group);
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, rows = (p.members + 15) / 16 * 16;
    own = owns + warp * 16 * D;
  }

  DEVICE const T* head(const Tensor& x) const { return head_of<const T>(x, at.batch, at.head); }
  // The first member that is a query: the class row is none for kKey, and what it holds must not be looked at.
  DEVICE int asks() const { return p.role == kKey; }

  // Starts the copy of `count` members from `first` on, by the whole block.
  DEVICE void fetch(T* to, const Tensor& x, int first, int count, int begin) const {
    fetch_rows<D>(to, p, x, head(x), start, first, count, begin, p.members, threadIdx.x, blockDim.x);
  }
  // 16 members from `row` on as left operands, through `own`; waits for all copies of this thread.
  DEVICE void load(LeftRows<D>& to, const Tensor& x, int row, int begin) const {
    __syncwarp();
    fetch_rows<D>(own, p, x, head(x), start, row, 16, begin, p.members, lane, 32);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    to.load(own);
  }
  // Sums [16, D] times a factor for rows g and g + 8 of each lane, into those rows from `row` on that exist and are
  // `begin` or later; with `part`, that of the class row goes there instead, in float32.
  DEVICE void store(const Tensor& x, int row, const float (&acc)[D / 8][4], const float (&factor)[2], int begin,
                    float* part) const {
    const int g = lane >> 2, t = lane & 3;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const float a0 = acc[c][0] * factor[0], a1 = acc[c][1] * factor[0];
      reinterpret_cast<uint32_t*>(chunk_of<D>(own, g, c))[t] = pack<T>(a0, a1);
      reinterpret_cast<uint32_t*>(chunk_of<D>(own, g + 8, c))[t] =
          pack<T>(acc[c][2] * factor[1], acc[c][3] * factor[1]);
      if (part && row + g == 0) part[8 * c + 2 * t] = a0, part[8 * c + 2 * t + 1] = a1;
    }
    __syncwarp();
    T* to = head_of<T>(x, at.batch, at.head);
    for (int i = lane; i < 16 * (D / 8); i += 32) {
      const int member = row + i / (D / 8), chunk = i % (D / 8);
      if (member < begin || member >= p.members || (part && member == 0)) continue;
      store16(row_of(to, x, member_row(p, start, member)) + 8 * chunk,
              *reinterpret_cast<const uint4*>(chunk_of<D>(own, member - row, chunk)));
    }
  }
  // Zeros for row 0 where it takes no part, by the first warp of a clip's first block.
  DEVICE void zero(const Tensor& x) const {
    if (p.first == 1 && at.group == 0 && at.tile == 0 && warp == 0) store_zeros<T, D>(x, at.batch, at.head);
  }
};

// Of rows g and g + 8 of a lane: largest score so far in units of log2, this lane's share of sum(e) and sum(e * dp).
struct RowSums {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, dot[2] = {};

  // The factor by which what was summed up so far shrinks; s, scores of 16 keys each, become exponentials.
  template <int N>
  DEVICE void add(float (&s)[N][2][4], const float (&dp)[N][2][4], bool backward, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = top[half];
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) now = fmaxf(now, s[i >> 2][i >> 1 & 1][2 * half + (i & 1)]);
      now = quad_max(now);
      const float zero = now == -INFINITY ? 0.0f : now;  // nothing but -inf so far is no NaN yet
      shrink[half] = ex2(top[half] - zero), top[half] = now;
      total[half] *= shrink[half], dot[half] *= shrink[half];
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        float& e = s[i >> 2][i >> 1 & 1][2 * half + (i & 1)];
        e = ex2(e - zero), total[half] += e;
        if (backward) dot[half] = fmaf(e, dp[i >> 2][i >> 1 & 1][2 * half + (i & 1)], dot[half]);
      }
    }
  }
};

// Of a warp's queries from `row` on: keeps their statistics and stores the weighted sums of values, the class row's as
// a part of the whole.
template <class T, int D>
DEVICE void finish_forward(const Sequence<T, D>& block, int row, const RowSums& sums, const float (&acc)[D / 8][4]) {
  const Problem& p = block.p;
  const Place& at = block.at;
  const int64_t part = part_index(p, at.batch, at.head, at.group);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sums.total[half]), top = sums.top[half] * kLn2;
    const int member = row + (block.lane >> 2) + 8 * half;
    const bool global = p.role == kGlobal && member == 0;  // its parts are divided when all groups are known
    factor[half] = global ? 1.0f : reciprocal(total);
    if ((block.lane & 3) != 0 || member < block.asks() || member >= p.members) continue;
    if (global) p.sums[2 * part] = top, p.sums[2 * part + 1] = total;
    if (p.stats && !global) {
      float* to = p.stats + 2 * row_index(p, at.batch, at.head, at.group, member);
      to[0] = top, to[1] = total;
    }
  }
  block.store(p.out, row, acc, factor, block.asks(), p.role >= kPerGroup ? p.parts + part * D : nullptr);
}

// Scores of 16 keys from `key` on in units of log2, -inf for those that do not exist.
DEVICE void scale_scores(float (&s)[2][4], float scale, int key, int members, int t) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = key + 8 * (i >> 2) + 2 * t + (i & 1);
    s[i >> 2][i & 3] = column < members ? s[i >> 2][i & 3] * scale : -INFINITY;
  }
}

// --- host -----------------------------------------------------------------------------------------------------------

// More than 48 KiB of shared memory has to be asked for, once on each device.
template <class Kernel>
int32_t allow_shared(Kernel kernel, const char* name, std::atomic<uint64_t>& allowed, int bytes = kRowShared) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < 64 && allowed.load() >> device & 1) return TSK_OK;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess)
    return fail(int32_t(error), "kernel %s: %s (CUDA error %d)", name, cudaGetErrorString(error), int(error));
  if (device < 64) allowed.fetch_or(uint64_t(1) << device);
  return TSK_OK;
}

}  // namespace tsk
