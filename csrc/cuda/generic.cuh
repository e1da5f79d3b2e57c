// SPDX-License-Identifier: Apache-2.0
// Attention for whatever no faster kernel takes: any length, role and stride, head_dim up to 256, float32 too.
//
// A warp owns a row. Scores of 32 members at a time, one member to a lane, whose row the lane reads alone; then the sum
// over the members, each lane for its own part of the head dimension. All arithmetic is float32, and products of
// float32 are exact ones: no tensor core. The backward has a kernel that owns queries (dq) and one that owns keys (dk,
// dv), so nothing is added up across warps but the class row's parts, in class_row.cuh.
#pragma once
#include <type_traits>

#include "problem.cuh"

namespace tsk {

constexpr int kGenericWarps = 4;  // of a block
constexpr int kGenericMaxHeadDim = 256;

// --- rows -----------------------------------------------------------------------------------------------------------

// A warp's copy of a row: to [D] float32 in shared memory.
template <class T>
DEVICE void stage_row(float* to, const T* row, int D, int lane) {
  for (int d = lane; d < D; d += 32) to[d] = to_float(row[d]);
}

// Product of a row in memory and a staged one. Both directions form a score in this order: its last bit agrees.
template <class T>
DEVICE float dot_row(const T* row, const float* staged, int D) {
  float sum[4] = {};
  int d = 0;
  for (; d + 4 <= D; d += 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(to_float(row[d + i]), staged[d + i], sum[i]);
  for (; d < D; ++d) sum[0] = fmaf(to_float(row[d]), staged[d], sum[0]);
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
    forward_rows(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  SHARED(float, queries, [kGenericWarps][32 * N]);
  SHARED(float, exponentials, [kGenericWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = p.head_dim;
  const Place at = place_of(blocks, blockIdx.x);
  const int member = at.tile * kGenericWarps + warp;
  if (member == 0 && at.group == 0 && p.first == 1 && p.role <= kKey) store_zero_row<T>(p.out, at, D, lane);
  if (member >= p.members || (member == 0 && p.role == kKey)) return;

  const T *k = head_of<T>(p.k, at.batch, at.head), *v = head_of<T>(p.v, at.batch, at.head);
  const int32_t start = group_row(p, at.group), row = member_row(p, start, member);
  float *query = queries[warp], *e = exponentials[warp];
  stage_row(query, row_of(head_of<T>(p.q, at.batch, at.head), p.q, row), D, lane);
  __syncwarp();

  Sums sums;
  float acc[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int key = first + lane;
    float x = -INFINITY;
    if (key < p.members && sees(p, at.group, member, key))
      x = dot_row(row_of(k, p.k, member_row(p, start, key)), query, D) * p.scale;
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
    backward_queries(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  SHARED(float, queries, [kGenericWarps][32 * N]);
  SHARED(float, douts, [kGenericWarps][32 * N]);
  SHARED(float, gradients, [kGenericWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = p.head_dim;
  const Place at = place_of(blocks, blockIdx.x);
  const int member = at.tile * kGenericWarps + warp;
  if (member == 0 && at.group == 0 && p.first == 1 && p.role == kNoMember) store_zero_row<T>(p.dq, at, D, lane);
  if (member >= p.members || (member == 0 && p.role == kKey)) return;

  const T *k = head_of<T>(p.k, at.batch, at.head), *v = head_of<T>(p.v, at.batch, at.head);
  const int32_t start = group_row(p, at.group), row = member_row(p, start, member);
  const bool class_row = member == 0 && p.role >= kPerGroup;
  const float share = class_row && p.role == kPerGroup ? class_share(p, at.batch, at.group) : 1.f;
  float *query = queries[warp], *dout = douts[warp], *ds = gradients[warp];
  stage_row(query, row_of(head_of<T>(p.q, at.batch, at.head), p.q, row), D, lane);
  stage_row(dout, row_of(head_of<T>(p.dout, at.batch, at.head), p.dout, row), D, lane);
  __syncwarp();
  auto score = [&](int key) { return dot_row(row_of(k, p.k, member_row(p, start, key)), query, D) * p.scale; };
  auto value = [&](int key) { return dot_row(row_of(v, p.v, member_row(p, start, key)), dout, D) * share; };

  const int64_t index = row_index(p, at.batch, at.head, at.group, member);
  float sums[2];
  if (p.saved) {
    sums[0] = p.stats[2 * index], sums[1] = p.stats[2 * index + 1];
  } else {
    Sums made;
    for (int first = 0; first < p.members; first += 32) {
      float x = first + lane < p.members ? score(first + lane) : -INFINITY;
      made.add(x);
    }
    sums[0] = made.top, sums[1] = made.total;
    if (lane < 2) p.stats[2 * index + lane] = sums[lane];
  }

  float delta = 0;
  if (class_row && p.role == kGlobal) {  // over all groups: the product with what came out
    delta = dot_row(head_of<T>(p.out, at.batch, at.head), dout, D);
  } else {
    for (int key = lane; key < p.members; key += 32) delta = fmaf(probability(score(key), sums), value(key), delta);
    delta = warp_sum(delta);
  }
  if (lane == 0) p.delta[index] = delta;

  float dq[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int key = first + lane;
    ds[lane] = 0;
    if (key < p.members && sees(p, at.group, member, key))
      ds[lane] = probability(score(key), sums) * (value(key) - delta) * p.scale;
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
    backward_keys(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  SHARED(float, keys, [kGenericWarps][32 * N]);
  SHARED(float, values, [kGenericWarps][32 * N]);
  SHARED(float, probabilities, [kGenericWarps][32]);
  SHARED(float, gradients, [kGenericWarps][32]);
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
  float *key = keys[warp], *value = values[warp], *weights = probabilities[warp], *ds = gradients[warp];
  stage_row(key, row_of(head_of<T>(p.k, at.batch, at.head), p.k, row), D, lane);
  stage_row(value, row_of(head_of<T>(p.v, at.batch, at.head), p.v, row), D, lane);
  __syncwarp();

  auto asks = [&](int query) { return (query > 0 || p.role != kKey) && sees(p, at.group, query, member); };
  float dk[N] = {}, dv[N] = {};
  for (int first = 0; first < p.members; first += 32) {
    const int query = first + lane;
    weights[lane] = ds[lane] = 0;
    if (query < p.members && asks(query)) {
      const int32_t from = member_row(p, start, query);
      const int64_t index = row_index(p, at.batch, at.head, at.group, query);
      const float share = query == 0 && p.role == kPerGroup ? class_share(p, at.batch, at.group) : 1.f;
      const float x = probability(dot_row(row_of(q, p.q, from), key, D) * p.scale, p.stats + 2 * index);
      weights[lane] = x * share;
      ds[lane] = x * (dot_row(row_of(dout, p.dout, from), value, D) * share - p.delta[index]) * p.scale;
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

inline Blocks generic_blocks(const Problem& p) {
  return Blocks(p.batch, p.groups, (p.members + kGenericWarps - 1) / kGenericWarps, p.heads);
}

template <class T>
int32_t generic_forward(const Problem& p, cudaStream_t stream) {
  return with_share(p.head_dim, [&](auto share) {
    return launch("generic_forward", forward_rows<T, share()>, p, generic_blocks(p), 32 * kGenericWarps, 0, stream);
  });
}

template <class T>
int32_t generic_backward(const Problem& p, cudaStream_t stream) {
  return with_share(p.head_dim, [&](auto share) {
    const Blocks blocks = generic_blocks(p);
    const int threads = 32 * kGenericWarps;
    int32_t status = launch("generic_backward_queries", backward_queries<T, share()>, p, blocks, threads, 0, stream);
    if (status == TSK_OK)
      status = launch("generic_backward_keys", backward_keys<T, share()>, p, blocks, threads, 0, stream);
    return status;
  });
}

}  // namespace tsk
