// SPDX-License-Identifier: Apache-2.0
// Backward on compute capability 9.0 of the sequences that stream, and of those of more than 128 members that a block
// could hold whole: the two kernels of streaming_backward.cuh, on the products and copies of hopper.cuh. Four warps are
// a block and have 64 queries, or keys, as left operands in registers; three blocks share a multiprocessor. Of each 64
// rows that pass by the same panels are right operands of the scores, a row a column, and of the gradients, a row a
// row.
//
// Tried on an H200: the next scores asked for with what a stage adds, 32 keys at a time, was 2 % slower.
//
// Member 0 is no matrix row of what passes by: as a key for all queries, then as a query for all keys, it is met first
// by ordinary arithmetic. No atomics: the same bits at every run.
#pragma once
#include "hopper.cuh"
#include "streaming_backward.cuh"

namespace tsk {

constexpr int kHopperBackWarps = 4, kHopperBackThreads = 32 * kHopperBackWarps, kHopperBackBlocks = 3;

struct HopperPlan {
  HopperGrid queries, keys;  // of the kernels that own them; that of a forward is the first
};

// --- what passes by --------------------------------------------------------------------------------------------------

// step(stage, row) for every 64 rows of the patches
template <class T, int D, bool NUMBERS, class Step>
DEVICE void pass_by(const Stages<T, D, NUMBERS>& at, const HopperGrid& grid, const Place& place, int length,
                    Step step) {
  Turn turn;
  for (int row = 0; row < length; row += kHopperKeys, turn.next(grid.stages)) {
    fetch_over(at, turn, row, length, grid, place);
    barrier_wait(at.full + turn.stage, turn.round & 1);
    step(turn.stage, row);
    if ((threadIdx.x & 31) == 0) barrier_arrive(at.empty + turn.stage);
  }
}

// acc += weights of a warp's rows g and g + 8 times one row, given in memory
template <class T, int N>
DEVICE void add_one(float (&acc)[N][4], const float (&weight)[2], const T* one) {
#pragma unroll
  for (int c = 0; c < N; ++c) {
    const float2 x = unpack<T>(reinterpret_cast<const uint32_t*>(one)[4 * c + (threadIdx.x & 3)]);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[c][i] = fmaf(weight[i >> 1], i & 1 ? x.y : x.x, acc[c][i]);
  }
}

// Starts sums = left x^T for 16 STEPS rows of a panel from `first` on, a group of products.
template <int STEPS, class T, int D>
DEVICE void start_inner(float (&sums)[STEPS][2][4], const LeftRows<D>& left, const T* panel, int first) {
  static_assert(D == 64, "a row is one panel wide");
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    wgmma<T, 16 * STEPS, false>(sums[0], left.x[k], panel_operand(panel, first, 16 * k), k > 0);
  wgmma_commit();
}

// Starts acc += weights x for those rows, likewise.
template <int STEPS, class T>
DEVICE void start_mix(float (&acc)[8][4], const uint32_t (&weights)[STEPS][4], const T* panel, int first) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < STEPS; ++i) wgmma<T, 64, true>(acc, weights[i], panel_operand(panel, first + 16 * i, 0), true);
  wgmma_commit();
}

// --- queries ---------------------------------------------------------------------------------------------------------

// A warp's queries, and of rows g and g + 8 of each lane what makes a score s and dp a gradient of that score:
// ex2(s * scale - top) * (dp * slope - shift).
template <int D>
struct HopperQueries {
  LeftRows<D> q, dout;
  float scale, top[2], slope[2], shift[2];
};

// acc += the gradients of the scores of 16 STEPS keys of a stage, of which `exist` do, times these keys.
template <int STEPS, class T, int D>
DEVICE void meet_keys(const Stages<T, D>& at, int stage, const HopperQueries<D>& of, int exist,
                      float (&acc)[D / 8][4]) {
  float s[STEPS][2][4], dp[STEPS][2][4];
  wgmma_fence();
  start_inner(s, of.q, at.keys(stage, 0), 0);
  start_inner(dp, of.dout, at.values(stage, 0), 0);
  wgmma_wait<1>();
#pragma unroll
  for (int i = 0; i < 8 * STEPS; ++i) {
    float& x = s[i >> 3][i >> 2 & 1][i & 3];
    x = ex2(fmaf(x, of.scale, -of.top[i >> 1 & 1]));
  }
  if (exist < 16 * STEPS)  // not before: what is the least score depends on the sign of the scale
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (16 * (STEPS - 1) + 8 * (i >> 2) + 2 * int(threadIdx.x & 3) + (i & 1) >= exist)
        s[STEPS - 1][i >> 2][i & 3] = 0;
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 8 * STEPS; ++i)
    s[i >> 3][i >> 2 & 1][i & 3] *= fmaf(dp[i >> 3][i >> 2 & 1][i & 3], of.slope[i >> 1 & 1], -of.shift[i >> 1 & 1]);
  uint32_t w[STEPS][4];
#pragma unroll
  for (int i = 0; i < STEPS; ++i) pack_weights<T>(w[i], s[i]);
  start_mix(acc, w, at.keys(stage, 0), 0);
  wgmma_wait<0>();
}

// dq and what query_numbers() keeps
template <class T, int D>
__global__ void __launch_bounds__(kHopperBackThreads, kHopperBackBlocks)
    hopper_backward_queries_kernel(const __grid_constant__ Problem p, const __grid_constant__ HopperGrid grid) {
#ifdef TSK_HOPPER
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Stages<T, D> at(shared, grid.stages);
  const Sequence<T, D, true> block(p, grid.blocks);
  const Place& place = block.at;
  const int row = kHopperQueries * place.tile + 16 * block.warp;
  admit_kernel_behind();
  start_stages(at, kHopperBackWarps, grid, place);
  // All is asked for before any of it is waited for.
  const RawRows<D> raw_q = block.read(p.q, row, block.asks()), raw_dout = block.read(p.dout, row, block.asks());
  const RawRows<D> raw_out = block.read(p.out, row, block.asks());
  float2 stats[2];
  read_stats(block, row, stats);
  if (p.role == kNoMember) block.zero(p.dq);
  HopperQueries<D> of;
  of.scale = p.scale * kLog2e;
  LeftRows<D> out;
  block.arrange(of.q, raw_q), block.arrange(of.dout, raw_dout), block.arrange(out, raw_out);
  float factor[2], delta[2], dq[D / 8][4] = {};
  query_numbers(block, row, of.dout, out, stats, of.top, factor, delta);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    of.slope[half] = p.scale * factor[half], of.shift[half] = delta[half] * factor[half];
  if (p.role != kNoMember) {
    float s[2], dp[2];
    inner_one(s, of.q, block.head(p.k)), inner_one(dp, of.dout, block.head(p.v));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      s[half] = ex2(fmaf(s[half], of.scale, -of.top[half])) * fmaf(dp[half], of.slope[half], -of.shift[half]);
    // the one softmax of a global class row has the class key once
    if (p.role == kGlobal && place.group > 0 && row == 0 && block.lane < 4) s[0] = 0;
    add_one(dq, s, block.head(p.k));
  }
  __syncthreads();
  pass_by(at, grid, place, p.length, [&](int stage, int key) {
    const int left = p.length - key;
    if (left > 48)
      meet_keys<4>(at, stage, of, left, dq);
    else if (left > 32)
      meet_keys<3>(at, stage, of, left, dq);
    else if (left > 16)
      meet_keys<2>(at, stage, of, left, dq);
    else
      meet_keys<1>(at, stage, of, left, dq);
  });
  float* part = p.role < kPerGroup ? nullptr : p.parts + 3 * part_index(p, place.batch, place.head, place.group) * D;
  block.store(p.dq, row, dq, kOnes, block.asks(), part);
#endif
}

// --- keys ------------------------------------------------------------------------------------------------------------

// dk and dv += those of 32 queries of a stage from `first` on, of which `exist` do. What comes of dp is made while the
// products of dv are under way; the next scores as well would be more than there are registers for.
template <class T, int D>
DEVICE void meet_queries(const Stages<T, D, true>& at, int stage, int first, int exist, const LeftRows<D>& k,
                         const LeftRows<D>& v, float scale, float (&dk)[D / 8][4], float (&dv)[D / 8][4]) {
  const float4* numbers = at.numbers(stage) + first + 2 * (threadIdx.x & 3);
  float s[2][2][4], dp[2][2][4];
  uint32_t w[2][4], dw[2][4];
  wgmma_fence();
  start_inner(s, k, at.keys(stage, 0), first);
  start_inner(dp, v, at.values(stage, 0), first);
  wgmma_wait<1>();
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // columns
    const int column = 8 * (i >> 1) + (i & 1);
    const float top = numbers[column].x, factor = numbers[column].y;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = s[i >> 2][i >> 1 & 1][2 * half + (i & 1)];
      x = ex2(fmaf(x, scale * kLog2e, -top)) * factor;
      if (exist < 32 && column + 2 * int(threadIdx.x & 3) >= exist) x = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) pack_weights<T>(w[i], s[i]);
  start_mix(dv, w, at.values(stage, 0), first);
  wgmma_wait<1>();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float delta = numbers[8 * (i >> 1) + (i & 1)].z;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      s[i >> 2][i >> 1 & 1][2 * half + (i & 1)] *= fmaf(dp[i >> 2][i >> 1 & 1][2 * half + (i & 1)], scale, -delta);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) pack_weights<T>(dw[i], s[i]);
  start_mix(dk, dw, at.keys(stage, 0), first);
  wgmma_wait<0>();
}

// dk and dv, after the kernel of the queries
template <class T, int D>
__global__ void __launch_bounds__(kHopperBackThreads, kHopperBackBlocks)
    hopper_backward_keys_kernel(const __grid_constant__ Problem p, const __grid_constant__ HopperGrid grid) {
#ifdef TSK_HOPPER
  constexpr float kOnes[2] = {1, 1};
  SHARED_DYN(T, shared);
  const Stages<T, D, true> at(shared, grid.stages);
  const Sequence<T, D, true> block(p, grid.blocks);
  const Place& place = block.at;
  const int row = kHopperQueries * place.tile + 16 * block.warp;
  const RawRows<D> raw_k = block.read(p.k, row, 0), raw_v = block.read(p.v, row, 0);
  admit_kernel_behind();
  await_kernel_before();  // the numbers of the queries are among what passes by
  start_stages(at, kHopperBackWarps, grid, place);
  if (p.role == kNoMember) block.zero(p.dk), block.zero(p.dv);
  LeftRows<D> k, v;
  block.arrange(k, raw_k), block.arrange(v, raw_v);
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  if (p.role >= kPerGroup) {
    const float* of = p.delta + 4 * row_index(p, place.batch, place.head, place.group, 0);
    float s[2], dp[2];
    inner_one(s, k, block.head(p.q)), inner_one(dp, v, block.head(p.dout));
#pragma unroll
    for (int half = 0; half < 2; ++half) s[half] = ex2(fmaf(s[half], p.scale * kLog2e, -of[0])) * of[1];
    if (p.role == kGlobal && place.group > 0 && row == 0 && block.lane < 4) s[0] = 0;
    add_one(dv, s, block.head(p.dout));
#pragma unroll
    for (int half = 0; half < 2; ++half) s[half] *= fmaf(dp[half], p.scale, -of[2]);
    add_one(dk, s, block.head(p.q));
  }
  __syncthreads();
  pass_by(at, grid, place, p.length, [&](int stage, int query) {
    const int left = p.length - query;
    meet_queries(at, stage, 0, left, k, v, p.scale, dk, dv);
    if (left > 32) meet_queries(at, stage, 32, left - 32, k, v, p.scale, dk, dv);
  });
  float* part = p.role == kNoMember ? nullptr : p.parts + 3 * part_index(p, place.batch, place.head, place.group) * D;
  block.store(p.dk, row, dk, kOnes, 0, part ? part + D : nullptr);
  block.store(p.dv, row, dv, kOnes, 0, part ? part + 2 * D : nullptr);
#endif
}

// --- host ------------------------------------------------------------------------------------------------------------

// Describes what query_numbers() keeps of the patches. Without a workspace, where no more is asked than which kernels
// serve a call, there is nothing to describe.
inline bool map_numbers(CUtensorMap* map, const Problem& p) {
  if (!p.delta) return true;
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const cuuint64_t row = 4 * sizeof(float), group = row * p.members, head = group * p.groups;
  const cuuint64_t dims[5] = {8, cuuint64_t(p.length), cuuint64_t(p.groups), cuuint64_t(p.heads), cuuint64_t(p.batch)};
  const cuuint64_t bytes[4] = {row, group, head, head * p.heads};
  const cuuint32_t box[5] = {8, kHopperKeys, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, p.delta + 4 * (p.role != kNoMember), dims, bytes, box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether these kernels take a backward that streaming_backward.cuh serves elsewhere, on the current device, of that
// number; fills `plan`.
inline bool plan_hopper_backward(const Problem& p, int32_t device, HopperPlan* plan) {
  if (p.members <= kHopperQueries || p.head_dim != 64 || p.sequence.count > 1 || p.group.count > 1) return false;
  if (p.batch < 1 || !hopper_compiled(device)) return false;
  HopperGrid &queries = plan->queries, &keys = plan->keys;
  if (!map_rows(&queries.keys, p, p.k) || !map_rows(&queries.values, p, p.v)) return false;
  if (!map_rows(&keys.keys, p, p.q) || !map_rows(&keys.values, p, p.dout) || !map_numbers(&keys.numbers, p))
    return false;
  const int stages = (p.length + kHopperKeys - 1) / kHopperKeys;
  for (HopperGrid* grid : {&queries, &keys}) {
    grid->stages = stages <= kHopperStages ? stages : kHopperStages;
    grid->blocks = Blocks(p.batch, p.groups, (p.members + kHopperQueries - 1) / kHopperQueries, p.heads);
    grid->count = grid->blocks.count;
  }
  return queries.count <= INT32_MAX;
}

template <class T>
int32_t hopper_backward(const Problem& p, const HopperPlan& plan, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed[2]{};
  const auto run = [&](const char* name, auto kernel, auto stages, const HopperGrid& grid, int which) {
    if (int32_t status = allow_shared(kernel, name, allowed[which], stages(kHopperStages))) return status;
    return launch(name, kernel, p, grid, kHopperBackThreads, stages(grid.stages), stream, which == 1);
  };
  if (int32_t status =
          run("hopper_backward_queries", hopper_backward_queries_kernel<T, 64>, Stages<T, 64>::bytes, plan.queries, 0))
    return status;
  return run("hopper_backward_keys", hopper_backward_keys_kernel<T, 64>, Stages<T, 64, true>::bytes, plan.keys, 1);
}

}  // namespace tsk
