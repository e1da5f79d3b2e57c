// SPDX-License-Identifier: Apache-2.0
// Attention for whatever no faster kernel takes: any length, role and stride, head_dim up to 256, float32 too.
//
// A warp owns a row. Scores of 32 members at a time, one member to a lane: the warp fetches 32 columns of their rows
// together, whole lines of memory, and each lane goes through its member's in shared memory. Then the sum over the
// members, each lane for its own part of the head dimension. All arithmetic is float32, and products of
// float32 are exact ones: no tensor core. The backward has a kernel that owns queries (dq) and one that owns keys (dk,
// dv), so nothing is added up across warps but the class row's parts, in class_row.cuh.
#pragma once
#include <type_traits>

#include "problem.cuh"

namespace tsk {

constexpr int kGenericWarps = 4;  // of a block
constexpr int kGenericMaxHeadDim = 256;
constexpr int kGenericColumns = 32;  // of members' rows in shared memory at a time
// The grid of the kernels, and whether all rows can be read 16 bytes at a time: uniform, for a branch per tile.
struct GenericGrid : Blocks {
  bool wide;

  __host__ explicit GenericGrid(const Problem& p);
};

// --- rows -----------------------------------------------------------------------------------------------------------

template <int N>
struct alignas(16) StagedRow {
  float x[32 * N];
};

// A warp's copy of a row: to [32 N] float32 in shared memory, zero from D on.
template <class T, int N>
DEVICE void stage_row(float* to, const T* row, int D, int lane) {
#pragma unroll
  for (int d = lane; d < 32 * N; d += 32) to[d] = d < D ? to_float(row[d]) : 0.f;
}

// What a load of 16 bytes holds, as float32.
DEVICE void widen(float4 (&to)[1], uint4 x, float) {
  to[0] = {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}
template <class T>
DEVICE void widen(float4 (&to)[2], uint4 x, T) {
  const float2 a = unpack<T>(x.x), b = unpack<T>(x.y), c = unpack<T>(x.z), d = unpack<T>(x.w);
  to[0] = {a.x, a.y, b.x, b.y}, to[1] = {c.x, c.y, d.x, d.y};
}

// 32 columns of 32 members' rows. Nine times four floats to a row: neither the writes of a few rows nor the reads of
// one column of all meet in a bank.
struct alignas(16) GenericTile {
  float rows[32][kGenericColumns + 4];
};

DEVICE float4& four(float* at) { return *reinterpret_cast<float4*>(at); }

// Columns `first` and on of the rows of `count` members, lane i knowing the row of member i; zero from D on.
template <class T>
DEVICE void fill_tile(GenericTile& tile, const T* head, const Tensor& x, int32_t row, int count, int first, int D,
                      bool wide, int lane) {
  constexpr int kWide = 16 / sizeof(T), kLanes = kGenericColumns / kWide;  // elements of a load, lanes of a row
  if (wide) {
    const int column = lane % kLanes * kWide;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int member = i * (32 / kLanes) + lane / kLanes;
      const int32_t from = __shfl_sync(~0u, row, member);
      float4 to[kWide / 4] = {};
      if (member < count && first + column < D) widen(to, load16(row_of(head, x, from) + first + column), T());
#pragma unroll
      for (int j = 0; j < kWide / 4; ++j) four(tile.rows[member] + column + 4 * j) = to[j];
    }
  } else {
#pragma unroll 8
    for (int member = 0; member < 32; ++member) {
      const int32_t from = __shfl_sync(~0u, row, member);
      float to = 0;
      if (member < count && first + lane < D) to = to_float(row_of(head, x, from)[first + lane]);
      tile.rows[member][lane] = to;
    }
  }
}

// Products of the rows of `count` members, lane i knowing the row of member i, and a staged one: lane i gets member
// i's. Both directions form a score in this order: its last bit agrees.
template <class T>
DEVICE float dot_rows(GenericTile& tile, const T* head, const Tensor& x, int32_t row, int count, float* staged, int D,
                      bool wide, int lane) {
  float sum[4] = {};
  for (int first = 0; first < D; first += kGenericColumns) {
    fill_tile(tile, head, x, row, count, first, D, wide, lane);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < kGenericColumns / 4; ++d) {
      const float4 a = four(tile.rows[lane] + 4 * d), b = four(staged + first + 4 * d);
      sum[0] = fmaf(a.x, b.x, sum[0]), sum[1] = fmaf(a.y, b.y, sum[1]);
      sum[2] = fmaf(a.z, b.z, sum[2]), sum[3] = fmaf(a.w, b.w, sum[3]);
    }
    __syncwarp();
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// acc += factor * row, the lane's part of it.
template <class T, int N>
DEVICE void add_row(float (&acc)[N], const T* row, float factor, int D, int lane) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (lane + 32 * i < D) acc[i] = fmaf(factor, to_float(row[lane + 32 * i]), acc[i]);
}

template <class T, int N>
DEVICE void store_row(T* row, const float (&x)[N], float divisor, int D, int lane) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (lane + 32 * i < D) from_float(row[lane + 32 * i], x[i] / divisor);
}

template <class T>
DEVICE void store_zero_row(const Tensor& x, const Place& at, int D, int lane) {
  T* row = head_of<T>(x, at.batch, at.head);
  for (int d = lane; d < D; d += 32) from_float(row[d], 0.f);
}

DEVICE float warp_max(float x) {
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
DEVICE float warp_sum(float x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// --- softmax --------------------------------------------------------------------------------------------------------

// The one softmax of a global class row counts the class key once.
DEVICE bool sees(const Problem& p, int group, int query, int key) {
  return p.role != kGlobal || query != 0 || key != 0 || group == 0;
}

// Largest score and sum of exp(score - it) of a row, as members pass by.
struct Sums {
  float top = -INFINITY, total = 0;

  // Takes in a warp's scores, -inf where there is none. Returns what all that was added up so far shrinks by; the
  // lane's score becomes its exponential. A row of -inf alone, and one with a NaN, ends as NaN, as in eager.
  DEVICE float add(float& score) {
    const float now = fmaxf(top, warp_max(score));
    const float zero = now == -INFINITY ? 0.f : now;
    const float shrink = expf(top - zero);
    score = expf(score - zero);
    total = total * shrink + warp_sum(score);
    top = now;
    return shrink;
  }
};

// The largest score and the sum that turn a score into a probability. They stay apart: at scores of 1e5 a float32 has
// no room for the logarithm of the sum beside the maximum.
DEVICE float probability(float score, const float* sums) { return expf(score - sums[0]) / sums[1]; }

// --- kernels --------------------------------------------------------------------------------------------------------

// out, and with p.stats the sums of every row. Blocks(batch, groups, tiles of 4 members, heads).
template <class T, int N>
__global__ void __launch_bounds__(32 * kGenericWarps, 1)
    forward_rows(const __grid_constant__ Problem p, const __grid_constant__ GenericGrid blocks) {
  SHARED(StagedRow<N>, queries, [kGenericWarps]);
  SHARED(float, exponentials, [kGenericWarps][32]);
  SHARED(GenericTile, tiles, [kGenericWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = p.head_dim;
  const Place at = place_of(blocks, blockIdx.x);
  const int member = at.tile * kGenericWarps + warp;
  if (member == 0 && at.group == 0 && p.first == 1 && p.role <= kKey) store_zero_row<T>(p.out, at, D, lane);
  if (member >= p.members || (member == 0 && p.role == kKey)) return;

  const T *k = head_of<T>(p.k, at.batch, at.head), *v = head_of<T>(p.v, at.batch, at.head);
  const int32_t start = group_row(p, at.group), row = member_row(p, start, member);
  float *query = queries[warp].x, *e = exponentials[warp];
  stage_row<T, N>(query, row_of(head_of<T>(p.q, at.batch, at.head), p.q, row), D, lane);
  __syncwarp();

  Sums sums;
  float acc[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int key = first + lane;
    const int32_t from = member_row(p, start, key < p.members ? key : 0);
    float x = times(dot_rows(tiles[warp], k, p.k, from, p.members - first, query, D, blocks.wide, lane), p.scale);
    if (key >= p.members || !sees(p, at.group, member, key)) x = -INFINITY;
    const float shrink = sums.add(x);
    e[lane] = x;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) acc[i] *= shrink;
    for (int i = 0; i < 32 && first + i < p.members; ++i)
      if (sees(p, at.group, member, first + i))
        add_row(acc, row_of(v, p.v, member_row(p, start, first + i)), e[i], D, lane);
    __syncwarp();
  }

  const bool class_row = member == 0 && p.role >= kPerGroup;
  if (class_row) {
    const int64_t part = part_index(p, at.batch, at.head, at.group);
    store_row(p.parts + part * D, acc, p.role == kGlobal ? 1.f : sums.total, D, lane);
    if (p.role == kGlobal && lane < 2) p.sums[2 * part + lane] = lane ? sums.total : sums.top;
  } else {
    store_row(row_of(head_of<T>(p.out, at.batch, at.head), p.out, row), acc, sums.total, D, lane);
  }
  if (p.stats && !(class_row && p.role == kGlobal) && lane < 2)
    p.stats[2 * row_index(p, at.batch, at.head, at.group, member) + lane] = lane ? sums.total : sums.top;
}

// dq, p.delta and, where the forward has not kept them, p.stats. Blocks as in the forward.
template <class T, int N>
__global__ void __launch_bounds__(32 * kGenericWarps, 1)
    backward_queries(const __grid_constant__ Problem p, const __grid_constant__ GenericGrid blocks) {
  SHARED(StagedRow<N>, queries, [kGenericWarps]);
  SHARED(StagedRow<N>, douts, [kGenericWarps]);
  SHARED(float, gradients, [kGenericWarps][32]);
  SHARED(GenericTile, tiles, [kGenericWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = p.head_dim;
  const Place at = place_of(blocks, blockIdx.x);
  const int member = at.tile * kGenericWarps + warp;
  if (member == 0 && at.group == 0 && p.first == 1 && p.role == kNoMember) store_zero_row<T>(p.dq, at, D, lane);
  if (member >= p.members || (member == 0 && p.role == kKey)) return;

  const T *k = head_of<T>(p.k, at.batch, at.head), *v = head_of<T>(p.v, at.batch, at.head);
  const int32_t start = group_row(p, at.group), row = member_row(p, start, member);
  const bool class_row = member == 0 && p.role >= kPerGroup;
  const float share = class_row && p.role == kPerGroup ? class_share(p, at.batch, at.group) : 1.f;
  float *query = queries[warp].x, *dout = douts[warp].x, *ds = gradients[warp];
  stage_row<T, N>(query, row_of(head_of<T>(p.q, at.batch, at.head), p.q, row), D, lane);
  stage_row<T, N>(dout, row_of(head_of<T>(p.dout, at.batch, at.head), p.dout, row), D, lane);
  __syncwarp();
  // Of 32 keys from `first` on, a lane's own; a lane that has no key gets something finite.
  auto products = [&](const T* head, const Tensor& x, float* staged, int first) {
    const int32_t from = member_row(p, start, first + lane < p.members ? first + lane : 0);
    return dot_rows(tiles[warp], head, x, from, p.members - first, staged, D, blocks.wide, lane);
  };
  auto score = [&](int first) { return times(products(k, p.k, query, first), p.scale); };
  auto value = [&](int first) { return times(products(v, p.v, dout, first), share); };

  const int64_t index = row_index(p, at.batch, at.head, at.group, member);
  float sums[2];
  if (p.saved) {
    sums[0] = p.stats[2 * index], sums[1] = p.stats[2 * index + 1];
  } else {
    Sums made;
    for (int first = 0; first < p.members; first += 32) {
      float x = score(first);
      if (first + lane >= p.members) x = -INFINITY;
      made.add(x);
    }
    sums[0] = made.top, sums[1] = made.total;
    if (lane < 2) p.stats[2 * index + lane] = lane ? sums[1] : sums[0];
  }

  float delta = 0;
  // Of a global class row, over all groups, it is the product with what came out, formed in the order of the products
  // it is taken from: where one key has all the weight they are the same number.
  const bool whole = class_row && p.role == kGlobal;
  for (int first = 0; first < (whole ? 1 : p.members); first += 32) {
    const int key = first + lane;
    const int32_t from = whole ? 0 : member_row(p, start, key < p.members ? key : 0);
    const Tensor& x = whole ? p.out : p.v;
    const float dp = times(dot_rows(tiles[warp], head_of<const T>(x, at.batch, at.head), x, from,
                                    whole ? 32 : p.members - first, dout, D, !whole && blocks.wide, lane),
                           share);
    if (whole)
      delta = lane == 0 ? dp : 0.0f;
    else if (const float score_of_key = score(first); key < p.members)
      delta = fmaf(probability(score_of_key, sums), dp, delta);
  }
  delta = warp_sum(delta);
  if (lane == 0) p.delta[index] = delta;

  float dq[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int key = first + lane;
    const float x = score(first), dp = value(first);
    const bool seen = key < p.members && sees(p, at.group, member, key);
    ds[lane] = seen ? probability(x, sums) * (dp - delta) * p.scale : 0.f;
    __syncwarp();
    for (int i = 0; i < 32 && first + i < p.members; ++i)
      if (sees(p, at.group, member, first + i))
        add_row(dq, row_of(k, p.k, member_row(p, start, first + i)), ds[i], D, lane);
    __syncwarp();
  }
  if (class_row)
    store_row(p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D, dq, 1.f, D, lane);
  else
    store_row(row_of(head_of<T>(p.dq, at.batch, at.head), p.dq, row), dq, 1.f, D, lane);
}

// dk and dv, after the kernel of the queries. Blocks as in the forward.
template <class T, int N>
__global__ void __launch_bounds__(32 * kGenericWarps, 1)
    backward_keys(const __grid_constant__ Problem p, const __grid_constant__ GenericGrid blocks) {
  SHARED(StagedRow<N>, keys, [kGenericWarps]);
  SHARED(StagedRow<N>, values, [kGenericWarps]);
  SHARED(float, probabilities, [kGenericWarps][32]);
  SHARED(float, gradients, [kGenericWarps][32]);
  SHARED(GenericTile, tiles, [kGenericWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = p.head_dim;
  const Place at = place_of(blocks, blockIdx.x);
  const int member = at.tile * kGenericWarps + warp;
  if (member == 0 && at.group == 0 && p.first == 1 && p.role == kNoMember) {
    store_zero_row<T>(p.dk, at, D, lane);
    store_zero_row<T>(p.dv, at, D, lane);
  }
  if (member >= p.members) return;

  const T *q = head_of<T>(p.q, at.batch, at.head), *dout = head_of<T>(p.dout, at.batch, at.head);
  const int32_t start = group_row(p, at.group), row = member_row(p, start, member);
  float *key = keys[warp].x, *value = values[warp].x, *weights = probabilities[warp], *ds = gradients[warp];
  stage_row<T, N>(key, row_of(head_of<T>(p.k, at.batch, at.head), p.k, row), D, lane);
  stage_row<T, N>(value, row_of(head_of<T>(p.v, at.batch, at.head), p.v, row), D, lane);
  __syncwarp();

  auto asks = [&](int query) { return (query > 0 || p.role != kKey) && sees(p, at.group, query, member); };
  float dk[N] = {}, dv[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int query = first + lane;
    const int32_t from = member_row(p, start, query < p.members ? query : 0);
    const auto products = [&](const T* head, const Tensor& x, float* staged) {
      return dot_rows(tiles[warp], head, x, from, p.members - first, staged, D, blocks.wide, lane);
    };
    const float score = times(products(q, p.q, key), p.scale), dp = products(dout, p.dout, value);
    weights[lane] = ds[lane] = 0;
    if (query < p.members && asks(query)) {
      const int64_t index = row_index(p, at.batch, at.head, at.group, query);
      const float share = query == 0 && p.role == kPerGroup ? class_share(p, at.batch, at.group) : 1.f;
      const float x = probability(score, p.stats + 2 * index);
      weights[lane] = x * share;
      ds[lane] = x * (times(dp, share) - p.delta[index]) * p.scale;
    }
    __syncwarp();
    for (int i = 0; i < 32 && first + i < p.members; ++i) {
      if (!asks(first + i)) continue;
      const int32_t from = member_row(p, start, first + i);
      add_row(dk, row_of(q, p.q, from), ds[i], D, lane);
      add_row(dv, row_of(dout, p.dout, from), weights[i], D, lane);
    }
    __syncwarp();
  }
  if (member == 0 && p.role != kNoMember) {
    float* part = p.parts + 3 * part_index(p, at.batch, at.head, at.group) * D;
    store_row(part + D, dk, 1.f, D, lane);
    store_row(part + 2 * D, dv, 1.f, D, lane);
  } else {
    store_row(row_of(head_of<T>(p.dk, at.batch, at.head), p.dk, row), dk, 1.f, D, lane);
    store_row(row_of(head_of<T>(p.dv, at.batch, at.head), p.dv, row), dv, 1.f, D, lane);
  }
}

// --- launches -------------------------------------------------------------------------------------------------------

// call(integral constant N): the lane's share of the head dimension, 32 N >= D.
template <class Call>
int32_t with_share(int D, Call call) {
  if (D <= 64) return call(std::integral_constant<int, 2>());
  if (D <= 128) return call(std::integral_constant<int, 4>());
  return call(std::integral_constant<int, 8>());
}

// Whether the rows of a tensor that is read start at multiples of 16 bytes.
inline bool reads_wide(const Problem& p, const Tensor& x) {
  const int bytes = p.dtype == TSK_F32 ? 4 : 2, n = 16 / bytes;
  return uintptr_t(x.data) % 16 == 0 && p.head_dim % n == 0 && (p.batch == 1 || x.batch % n == 0) &&
         (p.heads == 1 || x.head % n == 0) && (p.tokens == 1 || x.token % n == 0);
}

inline GenericGrid::GenericGrid(const Problem& p)
    : Blocks(p.batch, p.groups, (p.members + kGenericWarps - 1) / kGenericWarps, p.heads),
      wide(reads_wide(p, p.q) && reads_wide(p, p.k) && reads_wide(p, p.v) && (!p.dq.data || reads_wide(p, p.dout))) {}

template <class T>
int32_t generic_forward(const Problem& p, cudaStream_t stream) {
  return with_share(p.head_dim, [&](auto share) {
    return launch("generic_forward", forward_rows<T, share()>, p, GenericGrid(p), 32 * kGenericWarps, 0, stream);
  });
}

template <class T>
int32_t generic_backward(const Problem& p, cudaStream_t stream) {
  return with_share(p.head_dim, [&](auto share) {
    const GenericGrid blocks(p);
    const int threads = 32 * kGenericWarps;
    int32_t status = launch("generic_backward_queries", backward_queries<T, share()>, p, blocks, threads, 0, stream);
    if (status == TSK_OK)
      status = launch("generic_backward_keys", backward_keys<T, share()>, p, blocks, threads, 0, stream);
    return status;
  });
}

}  // namespace tsk
