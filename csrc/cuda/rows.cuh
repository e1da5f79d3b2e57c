// SPDX-License-Identifier: Apache-2.0
// What the kernels of sequences over 16 members share: rows in shared memory and in registers, a warp with tiles of 16
// of them, a softmax whose scores come 16 keys at a time.
//
// Rows lie in shared memory as 16-byte chunks, chunk c of row r in place c ^ r (its lowest bits): eight rows of one
// chunk are in eight different groups of four banks, as ldmatrix reads them. What one warp alone needs goes between
// global memory and registers without them: 16 bytes to a lane, turned into fragments by quad_transpose.
#pragma once
#include <atomic>

#include "matrix.cuh"

namespace tsk {

constexpr int kRowTile = 16;               // rows of a tile; sequences of no more are short.cuh's
constexpr int kRowShared = 99 * 1024;      // bytes a block may have on every architecture
constexpr int kResidentMembers = 256;      // the longest sequence that a block holds whole
constexpr int kResidentMembersWide = 128;  // with a head_dim of 128

// Whether a block holds a whole sequence, in both directions; others stream, and their backward needs the forward's
// statistics. Mirrored by backends/cuda.py, stats_size().
inline bool holds_sequence(const Problem& p) {
  return p.members <= (p.head_dim > 64 ? kResidentMembersWide : kResidentMembers) && p.role != kGlobal;
}

// --- rows in shared memory -----------------------------------------------------------------------------------------

// Where a chunk of 8 elements of a row lies. From a row that is a multiple of 16 on, that of chunk a ^ b is that of
// chunk a, ^ 8 b.
template <int D>
DEVICE int chunk_place(int row, int chunk) {
  constexpr int kChunks = D / 8, kMask = kChunks < 8 ? kChunks - 1 : 7;
  const int turn = (kChunks < 8 ? row / (8 / kChunks) : row) & kMask;
  return row * D + 8 * (chunk ^ turn);
}
template <int D, class T>
DEVICE T* chunk_of(T* rows, int row, int chunk) {
  return rows + chunk_place<D>(row, chunk);
}

// Until at most `left` of this thread's groups of copies, 3 or fewer, are under way.
DEVICE void cp_async_wait_for(int left) {
  if (left >= 3) return cp_async_wait<3>();
  if (left == 2) return cp_async_wait<2>();
  if (left == 1) return cp_async_wait<1>();
  cp_async_wait<0>();
}

// --- rows in registers ---------------------------------------------------------------------------------------------

// The lanes of a quad hold four times four words: word i of lane t changes places with word t of lane i.
DEVICE void quad_transpose(uint32_t (&x)[4]) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int far = 1; far <= 2; far *= 2) {
    const bool upper = t & far;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = x[far == 1 ? 2 * i : i], &high = x[far == 1 ? 2 * i + 1 : i + 2];
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, far);
      (upper ? low : high) = other;
    }
  }
}

// 16 rows as left operands of D / 16 products
template <int D>
struct LeftRows {
  uint32_t x[D / 16][4];
};

// s[tile][step] = left x^T for the 16 rows of x from `first` on
template <class T, int D, int TILES, int STEPS>
DEVICE void inner_rows(float (&s)[TILES][STEPS][2][4], int step, const LeftRows<D> (&left)[TILES], const T* x,
                       int first) {
  const int lane = threadIdx.x & 31, right = chunk_place<D>((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
#pragma unroll
  for (int i = 0; i < 8 * TILES; ++i) s[i >> 3][step][i >> 2 & 1][i & 3] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    ldmatrix<4>(b, x + first * D + (right ^ 16 * k));
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const uint32_t (&a)[4] = left[i].x[k];
      mma<T>(s[i][step][0], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma<T>(s[i][step][1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// The same of 16 TILES rows in shared memory, for which there is no room in registers.
template <class T, int D, int TILES, int STEPS>
DEVICE void inner_shared(float (&s)[TILES][STEPS][2][4], int step, const T* left, const T* x, int first) {
  const int lane = threadIdx.x & 31, right = chunk_place<D>((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
  const int own = chunk_place<D>(lane & 15, lane >> 4);
#pragma unroll
  for (int i = 0; i < 8 * TILES; ++i) s[i >> 3][step][i >> 2 & 1][i & 3] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4], b[4];
    ldmatrix<4>(b, x + first * D + (right ^ 16 * k));
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      ldmatrix<4>(a, left + 16 * i * D + (own ^ 16 * k));
      mma<T>(s[i][step][0], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma<T>(s[i][step][1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// acc[tile] += w[tile] x, w packed weights of the 16 rows of x from `first` on
template <class T, int D, int TILES>
DEVICE void mix_packed(float (&acc)[TILES][D / 8][4], const uint32_t (&w)[TILES][4], const T* x, int first) {
  const int lane = threadIdx.x & 31, right = chunk_place<D>(lane & 15, lane >> 4);
  uint32_t b[4];
#pragma unroll
  for (int c = 0; c < D / 8; c += 2) {
    ldmatrix<4, true>(b, x + first * D + (right ^ 8 * c));
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      mma<T>(acc[i][c], w[i][0], w[i][1], w[i][2], w[i][3], b[0], b[1]);
      mma<T>(acc[i][c + 1], w[i][0], w[i][1], w[i][2], w[i][3], b[2], b[3]);
    }
  }
}

// acc[tile] += weights[tile][step](16 x 16) x for the 16 rows of x from `first` on
template <class T, int D, int TILES, int STEPS>
DEVICE void mix_rows(float (&acc)[TILES][D / 8][4], const float (&weights)[TILES][STEPS][2][4], int step, const T* x,
                     int first) {
  uint32_t w[TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i) pack_weights<T>(w[i], weights[i][step]);
  mix_packed<T, D>(acc, w, x, first);
}

// --- a block and its sequence --------------------------------------------------------------------------------------

// 16 rows as they come from memory, of which LeftRows are made: so that those of several tensors are under way at once.
template <int D>
struct RawRows {
  uint32_t words[2][D / 32][4];
};

// One head of one sequence, as a warp of its block sees it. ONE_AXIS: of the sequence, as of the groups. Where a row is
// needs no branch then, and what follows one cannot be asked for before it.
template <class T, int D, bool ONE_AXIS = false>
struct Sequence {
  const Problem& p;
  Place at;
  int32_t start;
  int lane, warp, warps, rows;  // rows: M, rounded up to 16

  DEVICE Sequence(const Problem& problem, const Blocks& blocks) : p(problem) {
    at = place_of(blocks, blockIdx.x), start = first_row(at.group);
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, rows = (p.members + 15) / 16 * 16;
  }

  DEVICE const T* head(const Tensor& x) const { return head_of<const T>(x, at.batch, at.head); }
  // group_row() and member_row()
  DEVICE int32_t first_row(int group) const {
    return ONE_AXIS ? p.first + group * p.group.step[0] : group_row(p, group);
  }
  DEVICE int32_t token(int member) const {
    if constexpr (!ONE_AXIS) return member_row(p, start, member);
    const int patch = member - (p.role != kNoMember);
    return patch < 0 ? 0 : start + patch * p.sequence.step[0];
  }
  // The first member that is a query: the class row is none for kKey, and what it holds must not be looked at.
  DEVICE int asks() const { return p.role == kKey; }

  // Starts the copy of `count` members from `first` on by the whole block, zeros where they do not exist or come
  // before `begin`; of y, if it is there, to `also`.
  DEVICE void fetch(T* to, const Tensor& x, int first, int count, int begin, T* also = nullptr,
                    const Tensor* y = nullptr) const {
    for (int i = threadIdx.x; i < count * (D / 8); i += blockDim.x) {
      const int row = i / (D / 8), chunk = i % (D / 8), member = first + row, place = chunk_place<D>(row, chunk);
      const int bytes = member >= begin && member < p.members ? 16 : 0;
      const int32_t from = token(bytes ? member : p.members - 1);
      cp_async16(to + place, row_of(head(x), x, from) + 8 * chunk, bytes);
      if (also) cp_async16(also + place, row_of(head(*y), *y, from) + 8 * chunk, bytes);
    }
  }
  // 16 members from `row` on, zeros as above.
  DEVICE RawRows<D> read(const Tensor& x, int row, int begin) const {
    RawRows<D> to;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int member = row + (lane >> 2) + 8 * half;
      const bool exists = member >= begin && member < p.members;
      const T* from = row_of(head(x), x, token(exists ? member : p.members - 1)) + 8 * (lane & 3);
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        const uint4 words = exists ? load16(from + 32 * c) : make_uint4(0, 0, 0, 0);
        to.words[half][c][0] = words.x, to.words[half][c][1] = words.y;
        to.words[half][c][2] = words.z, to.words[half][c][3] = words.w;
      }
    }
    return to;
  }
  // The same as left operands.
  DEVICE void load(LeftRows<D>& to, const Tensor& x, int row, int begin) const { arrange(to, read(x, row, begin)); }
  static DEVICE void arrange(LeftRows<D>& to, const RawRows<D>& from) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = from.words[i & 1][i >> 1][j];
      quad_transpose(y);
#pragma unroll
      for (int j = 0; j < 4; ++j) to.x[2 * (i >> 1) + (j >> 1)][(i & 1) + 2 * (j & 1)] = y[j];
    }
  }
  // Sums [16, D] times a factor for rows g and g + 8 of each lane, into those rows from `row` on that exist and are
  // `begin` or later; with `part`, that of the class row goes there instead, in float32.
  DEVICE void store(const Tensor& x, int row, const float (&acc)[D / 8][4], const float (&factor)[2], int begin,
                    float* part) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int member = row + g + 8 * half;
      const bool first = part && member == 0, wanted = member >= begin && member < p.members && !first;
      T* to = row_of(head_of<T>(x, at.batch, at.head), x, token(wanted ? member : 0)) + 8 * t;
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        uint32_t y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = acc[4 * c + i][2 * half] * factor[half], high = acc[4 * c + i][2 * half + 1] * factor[half];
          y[i] = pack<T>(low, high);
          if (first) part[32 * c + 8 * i + 2 * t] = low, part[32 * c + 8 * i + 2 * t + 1] = high;
        }
        quad_transpose(y);
        if (wanted) store16(to + 32 * c, make_uint4(y[0], y[1], y[2], y[3]));
      }
    }
  }
  // Zeros for row 0 where it takes no part, by the first warp of a clip's first block.
  DEVICE void zero(const Tensor& x) const {
    if (p.first == 1 && at.group == 0 && at.tile == 0 && warp == 0) store_zeros<T, D>(x, at.batch, at.head);
  }
};

// --- softmax -------------------------------------------------------------------------------------------------------

// Of rows g and g + 8 of a lane: largest score so far in units of log2, this lane's share of the sum of exponentials.
struct RowSums {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};

  // Takes in scores of 16 STEPS keys, which become exponentials. shrink: the factors of what was summed up before.
  template <int STEPS>
  DEVICE void add(float (&s)[STEPS][2][4], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = top[half];
#pragma unroll
      for (int i = 0; i < 4 * STEPS; ++i) now = fmaxf(now, s[i >> 2][i >> 1 & 1][2 * half + (i & 1)]);
      now = quad_max(now);
      const float zero = now == -INFINITY ? 0.0f : now;  // nothing but -inf so far is no NaN yet
      shrink[half] = ex2(top[half] - zero);
      top[half] = now, total[half] *= shrink[half];
#pragma unroll
      for (int i = 0; i < 4 * STEPS; ++i) {
        float& e = s[i >> 2][i >> 1 & 1][2 * half + (i & 1)];
        e = ex2(e - zero), total[half] += e;
      }
    }
  }
};

// The scores of 16 STEPS keys into the sums, and acc made to fit them. A warp whose largest scores stay has nothing to
// do for that: true of most steps but the first.
template <int TILES, int STEPS, int N>
DEVICE void add_scores(RowSums (&sums)[TILES], float (&s)[TILES][STEPS][2][4], float (&acc)[TILES][N][4]) {
  float shrink[TILES][2];
  bool shrinks = false;
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    sums[i].add(s[i], shrink[i]);
    shrinks |= !(shrink[i][0] == 1.0f && shrink[i][1] == 1.0f);
  }
  if (!__any_sync(~0u, shrinks)) return;
#pragma unroll
  for (int i = 0; i < 4 * N * TILES; ++i) acc[i / (4 * N)][i / 4 % N][i & 3] *= shrink[i / (4 * N)][i >> 1 & 1];
}

// Scores of 16 keys from `key` on in units of log2, -inf for those that do not exist.
DEVICE void scale_scores(float (&s)[2][4], float scale, int key, int members, int t) {
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i >> 2][i & 3] *= scale;
  if (key + 16 <= members) return;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (key + 8 * (i >> 2) + 2 * t + (i & 1) >= members) s[i >> 2][i & 3] = -INFINITY;
}

// A row's largest score in natural units and its sum. That is made relative to what `log2_top` of the former is, which
// is not the score itself: at scores of 1e5 the last bit counts.
DEVICE float log2_top(float natural) { return times(natural, kLog2e); }
DEVICE float2 natural_sums(float top, float total) {
  const float natural = times(top, kLn2);
  return make_float2(natural, total * ex2(top - log2_top(natural)));
}

// Of a warp's queries from `row` on: keeps their statistics and stores the weighted sums of values, the class row's as
// a part of the whole.
template <class T, int D, bool ONE_AXIS>
DEVICE void finish_forward(const Sequence<T, D, ONE_AXIS>& block, int row, const RowSums& sums,
                           const float (&acc)[D / 8][4]) {
  const Problem& p = block.p;
  const Place& at = block.at;
  const int64_t part = part_index(p, at.batch, at.head, at.group);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sums.total[half]);
    const int member = row + (block.lane >> 2) + 8 * half;
    const float2 kept = natural_sums(sums.top[half], total);
    const bool global = p.role == kGlobal && member == 0;  // its parts are divided when all groups are known
    factor[half] = global ? kept.y * reciprocal(total) : reciprocal(total);
    if ((block.lane & 3) != 0 || member < block.asks() || member >= p.members) continue;
    if (global) p.sums[2 * part] = kept.x, p.sums[2 * part + 1] = kept.y;
    if (p.stats && !global) {
      float* to = p.stats + 2 * row_index(p, at.batch, at.head, at.group, member);
      to[0] = kept.x, to[1] = kept.y;
    }
  }
  block.store(p.out, row, acc, factor, block.asks(), p.role >= kPerGroup ? p.parts + part * D : nullptr);
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
