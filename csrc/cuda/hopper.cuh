// SPDX-License-Identifier: Apache-2.0
// The forward on compute capability 9.0: sequences of more than 64 members on the products of four warps (wgmma), keys
// and values brought by the tensor memory accelerator (TMA). Space and joint attention, whatever the resolution.
//
// A block has two times four warps, each four with 64 queries at a time. Keys and values come 64 at a time through a
// ring of stages, whose barriers say what is there (full) and what has been read (empty). Where the whole sequence fits
// into the stages it stays there and one block has all of its queries. Two blocks share a multiprocessor, so that one's
// products hide the other's exponentials. One thread of the block asks for copies: a warp for that alone would take the
// registers from all others. What a stage's values add and the scores of the next stage are asked for in one go.
//
// Tried on an H200 without gain: to have the rows of the block that takes this one's place brought into the second
// cache.
//
// The class row is no key of the matrices: it is met first, by ordinary arithmetic, and the online softmax starts from
// it. So keys are the patches alone, one regular tensor, of which the last block has only as many as there are, rounded
// up to 16.
#pragma once
#include "rows.cuh"

namespace tsk {

constexpr int kHopperKeys = 64, kHopperQueries = 64;  // of a stage; of four warps
constexpr int kHopperStages = 4;
constexpr int kHopperWarps = 8, kHopperThreads = 32 * kHopperWarps;

// The instructions exist on sm_90a alone. A kernel compiled for another architecture is empty, and shows it by the
// threads that its block may have: see hopper_compiled().
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TSK_HOPPER 1
constexpr int kHopperMost = kHopperThreads;
#else
constexpr int kHopperMost = 32;
#endif

// What passes by are keys and values; in the backward's second kernel, queries and dout with the numbers of each.
struct HopperGrid {
  CUtensorMap keys, values;  // [B, H, G, L, D] of the patches
  CUtensorMap numbers;       // [B, H, G, L, 8] of p.delta, whose four floats are as many bytes as 8 elements
  Blocks blocks{0, 0, 0, 0};
  int64_t count = 0;   // of blocks
  int32_t stages = 0;  // in use
};

// --- shared memory -------------------------------------------------------------------------------------------------

// Stages, each D / 64 panels of keys, as many of values and, with NUMBERS, four of each row; barriers.
template <class T, int D, bool NUMBERS = false>
struct Stages {
  static constexpr int kPanel = kHopperKeys * 64;  // elements
  static constexpr int kBytes = kHopperKeys * (2 * D * int(sizeof(T)) + (NUMBERS ? int(sizeof(float4)) : 0));
  T* panels;
  uint64_t *full, *empty;

  DEVICE Stages(T* shared, int stages) {
    panels = shared + (-shared_address(shared) & 1023) / sizeof(T);
    full = reinterpret_cast<uint64_t*>(panels + stages * (kBytes / int(sizeof(T)))), empty = full + stages;
  }
  DEVICE T* keys(int stage, int panel) const { return panels + stage * (kBytes / int(sizeof(T))) + panel * kPanel; }
  DEVICE T* values(int stage, int panel) const { return keys(stage, D / 64 + panel); }
  DEVICE float4* numbers(int stage) const { return reinterpret_cast<float4*>(values(stage, D / 64)); }

  static int bytes(int stages) { return 1024 + stages * (kBytes + 2 * int(sizeof(uint64_t))); }
};

// Asks for the 64 keys and values from `key` on, one thread.
template <class T, int D, bool NUMBERS>
DEVICE void fetch_stage(const Stages<T, D, NUMBERS>& at, int stage, int key, const HopperGrid& grid,
                        const Place& place) {
  barrier_expect(at.full + stage, at.kBytes);
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    const int from[5] = {64 * panel, key, place.group, place.head, place.batch};
    copy_box(at.keys(stage, panel), grid.keys, at.full + stage, from);
    copy_box(at.values(stage, panel), grid.values, at.full + stage, from);
  }
  if constexpr (NUMBERS) {
    const int from[5] = {0, key, place.group, place.head, place.batch};
    copy_box(at.numbers(stage), grid.numbers, at.full + stage, from);
  }
}

// The barriers and first stages, a stage by each of the first warps. readers: the warps that it is read by.
template <class T, int D, bool NUMBERS>
DEVICE void start_stages(const Stages<T, D, NUMBERS>& at, int readers, const HopperGrid& grid, const Place& place) {
  static_assert(kHopperStages <= 4, "a warp for each");
  const int i = threadIdx.x >> 5;
  if ((threadIdx.x & 31) || i >= grid.stages) return;
  barrier_init(at.full + i, 1), barrier_init(at.empty + i, readers);
  fence_async();
  fetch_stage(at, i, kHopperKeys * i, grid, place);
}

// The place in the ring of what passes by, 64 rows at a time.
struct Turn {
  int stage = 0;
  uint32_t round = 0;

  DEVICE void next(int stages) {
    if (++stage == stages) stage = 0, ++round;
  }
};

// At the turn of the 64 rows from `row` on: has those fetched that go where the last but one were. By now all warps
// have read these, but for a few that are rarely waited for.
template <class T, int D, bool NUMBERS>
DEVICE void fetch_over(const Stages<T, D, NUMBERS>& at, const Turn& turn, int row, int length, const HopperGrid& grid,
                       const Place& place) {
  const int far = row + kHopperKeys * (grid.stages - 2);
  if (threadIdx.x == 0 && row >= 2 * kHopperKeys && far < length) {
    const bool before = turn.stage < 2;  // a round ago
    const int free = turn.stage - 2 + (before ? grid.stages : 0);
    barrier_wait(at.empty + free, (turn.round - before) & 1);
    fetch_stage(at, free, far, grid, place);
  }
  __syncwarp();
}

// call(the number of steps of 16 that `left`, 1 to 64 rows, take), a constant
template <class Call>
DEVICE void with_steps(int left, const Call& call) {
  if (left > 48)
    call(std::integral_constant<int, 4>());
  else if (left > 32)
    call(std::integral_constant<int, 3>());
  else if (left > 16)
    call(std::integral_constant<int, 2>());
  else
    call(std::integral_constant<int, 1>());
}

// --- 64 queries ----------------------------------------------------------------------------------------------------

// Products of a warp's rows with one row, given in memory.
template <class T, int D>
DEVICE void inner_one(float (&products)[2], const LeftRows<D>& rows, const T* one) {
  const int t = threadIdx.x & 3;
  products[0] = products[1] = 0;
#pragma unroll
  for (int c = 0; c < D / 8; ++c) {
    const float2 y = unpack<T>(reinterpret_cast<const uint32_t*>(one)[4 * c + t]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = unpack<T>(rows.x[c / 2][2 * (c & 1) + half]);
      products[half] = fmaf(x.x, y.x, fmaf(x.y, y.y, products[half]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) products[half] = quad_sum(products[half]);
}

// Of a warp's rows against one key, given in memory: the softmax starts with it, for all rows or all but row 0.
template <class T, int D>
DEVICE void start_with(const T* key, const T* value, const LeftRows<D>& q, float scale, bool skip, RowSums& sums,
                       float (&acc)[D / 8][4]) {
  const int t = threadIdx.x & 3;
  float score[2], e[2];
  inner_one(score, q, key);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = score[half] * scale;
    if (skip && half == 0 && (threadIdx.x & 31) < 4) top = -INFINITY;  // lanes that hold row 0
    e[half] = ex2(top - (top == -INFINITY ? 0.0f : top));
    sums.top[half] = top, sums.total[half] = t == 0 ? e[half] : 0.0f;
  }
#pragma unroll
  for (int c = 0; c < D / 8; ++c) {
    const float2 v = unpack<T>(reinterpret_cast<const uint32_t*>(value)[4 * c + t]);
    acc[c][0] = e[0] * v.x, acc[c][1] = e[0] * v.y, acc[c][2] = e[1] * v.x, acc[c][3] = e[1] * v.y;
  }
}

// RowSums::add() of 16 STEPS scores that are yet to be scaled, by a factor above 0
template <int STEPS>
DEVICE void add_scaled(RowSums& sums, float (&s)[4][2][4], float scale, float (&shrink)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float now = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4 * STEPS; ++i) now = fmaxf(now, s[i >> 2][i >> 1 & 1][2 * half + (i & 1)]);
    now = fmaxf(sums.top[half], quad_max(now) * scale);
    const float zero = now == -INFINITY ? 0.0f : now;  // nothing but -inf so far is no NaN yet
    shrink[half] = ex2(sums.top[half] - zero), sums.top[half] = now;
    sums.total[half] *= shrink[half];
#pragma unroll
    for (int i = 0; i < 4 * STEPS; ++i) {
      float& e = s[i >> 2][i >> 1 & 1][2 * half + (i & 1)];
      e = ex2(fmaf(e, scale, -zero)), sums.total[half] += e;
    }
  }
}

// Starts the scores of a stage's 64 keys, a group of products.
template <class T, int D>
DEVICE void start_scores(float (&s)[4][2][4], const Stages<T, D>& at, int stage, const LeftRows<D>& q) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    wgmma<T, 64, false>(s[0], q.x[k], panel_operand(at.keys(stage, k / 4), 0, 16 * (k & 3)), k > 0);
  wgmma_commit();
}

// The scores of 16 STEPS keys, of which `exist` do, into weights, and the sums so far made to fit them.
template <int STEPS, bool ALL, class T, int N>
DEVICE void weigh(float (&s)[4][2][4], float scale, int exist, RowSums& sums, float (&acc)[N][4], uint32_t (&w)[4][4]) {
  float shrink[2];
  if constexpr (!ALL) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (16 * (STEPS - 1) + 8 * (i >> 2) + 2 * t + (i & 1) >= exist) s[STEPS - 1][i >> 2][i & 3] = -INFINITY;
  }
  add_scaled<STEPS>(sums, s, scale, shrink);
  // A warp whose largest scores stay, as most do after the first keys, has nothing to correct.
  if (__any_sync(~0u, !(shrink[0] == 1.0f && shrink[1] == 1.0f)))
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) acc[i >> 2][i & 3] *= shrink[i >> 1 & 1];
#pragma unroll
  for (int i = 0; i < STEPS; ++i) pack_weights<T>(w[i], s[i]);
}

// Starts what the weights make of the values of 16 STEPS keys, a group of products.
template <int STEPS, class T, int D>
DEVICE void start_values(float (&acc)[D / 8][4], const uint32_t (&w)[4][4], const Stages<T, D>& at, int stage) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
      wgmma<T, 64, true>(acc + 8 * panel, w[i], panel_operand(at.values(stage, panel), 16 * i, 0), true);
  wgmma_commit();
}

template <class T, int D>
__global__ void __launch_bounds__(kHopperMost, D <= 64 ? 2 : 1)
    hopper_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ HopperGrid grid) {
#ifdef TSK_HOPPER
  SHARED_DYN(T, shared);
  const Stages<T, D> at(shared, grid.stages);
  const Sequence<T, D, true> block(p, grid.blocks);
  const Place& place = block.at;
  const int warp = __shfl_sync(~0u, block.warp, 0);  // one for all lanes, as the compiler cannot know otherwise
  const int tiles = (p.members + kHopperQueries - 1) / kHopperQueries, first = 2 * place.tile + (warp >> 2);
  admit_kernel_behind();
  start_stages(at, 2 * place.tile + 1 < tiles ? kHopperWarps : kHopperWarps / 2, grid, place);
  LeftRows<D> q;
  block.load(q, p.q, kHopperQueries * first + 16 * (warp & 3), block.asks());
  if (p.role <= kKey) block.zero(p.out);
  __syncthreads();

  const float scale = p.scale * kLog2e;
  for (int tile = first; tile < tiles; tile += 2 * int(grid.blocks.tiles.size)) {
    const int row = kHopperQueries * tile + 16 * (warp & 3);
    if (tile != first) block.load(q, p.q, row, block.asks());
    RowSums sums;
    float acc[D / 8][4] = {};
    if (p.role != kNoMember)  // the one softmax of a global class row has the class key once
      start_with(block.head(p.k), block.head(p.v), q, scale, p.role == kGlobal && place.group > 0 && row == 0, sums,
                 acc);
    // A stage's values and the scores of the next are products of one go. A warp without a query takes part in them,
    // which are of four warps, and has weights of zero.
    const bool asks = row < p.members;
    float s[4][2][4];
    uint32_t w[4][4] = {};
    Turn turn;
    int key = 0;
    barrier_wait(at.full, 0);
    wgmma_fence();
    start_scores(s, at, 0, q);
    for (; key + kHopperKeys < p.length; key += kHopperKeys) {
      fetch_over(at, turn, key, p.length, grid, place);
      wgmma_wait<0>();
      if (asks) weigh<4, true, T>(s, scale, 64, sums, acc, w);
      const int now = turn.stage;
      turn.next(grid.stages);
      barrier_wait(at.full + turn.stage, turn.round & 1);
      wgmma_fence();
      start_values<4>(acc, w, at, now);
      start_scores(s, at, turn.stage, q);
      wgmma_wait<1>();
      if (block.lane == 0) barrier_arrive(at.empty + now);
    }
    wgmma_wait<0>();
    const auto last = [&](auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      if (asks) weigh<kSteps, false, T>(s, scale, p.length - key, sums, acc, w);
      wgmma_fence();
      start_values<kSteps>(acc, w, at, turn.stage);
      wgmma_wait<0>();
    };
    with_steps(p.length - key, last);
    if (row < p.members) finish_forward(block, row, sums, acc);
  }
#endif
}

// --- host ----------------------------------------------------------------------------------------------------------

// The driver's function that describes a tensor to the accelerator: asked for, so that the library does not need
// libcuda to be loaded. Null where the driver is too old.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (result != cudaDriverEntryPointSuccess) return cudaGetLastError(), nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Describes keys or values, false where that cannot be. Steps are positive multiples of 16 bytes; one along an axis of
// size 1 is never taken.
inline bool map_rows(CUtensorMap* map, const Problem& p, const Tensor& x) {
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const int64_t token = x.token, sizes[5] = {p.head_dim, p.length, p.groups, p.heads, p.batch};
  const int64_t steps[4] = {p.sequence.step[0] * token, p.group.step[0] * token, x.head, x.batch};
  cuuint64_t dims[5] = {cuuint64_t(p.head_dim)}, bytes[4];
  for (int i = 0; i < 4; ++i) {
    if (sizes[i + 1] > 1 && (steps[i] <= 0 || steps[i] >= int64_t(1) << 39)) return false;
    dims[i + 1] = cuuint64_t(sizes[i + 1]), bytes[i] = cuuint64_t(sizes[i + 1] > 1 ? 2 * steps[i] : 16);
  }
  const cuuint32_t box[5] = {64, kHopperKeys, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
  const auto type = p.dtype == TSK_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 5, static_cast<char*>(x.data) + 2 * p.first * token, dims, bytes, box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether the kernels that the current device, of that number, would run hold instructions: compiled for 90a they do.
inline bool hopper_compiled(int32_t device) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return false;
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, hopper_forward_kernel<bfloat16, 64>) == cudaSuccess)
    return attributes.maxThreadsPerBlock >= kHopperThreads;
  cudaGetLastError();  // the kernels that serve instead are not to be blamed for it
  return false;
}

// Whether the kernel takes a call on the current device, of that number; fills `grid`. Exponents are scaled after their
// maximum is known, so the scale has to be positive.
inline bool plan_hopper(const Problem& p, int32_t device, HopperGrid* grid) {
  if (p.dq.data || p.members <= kHopperQueries || p.head_dim < 64 || !half_operands(p) || !(p.scale > 0)) return false;
  if (p.batch < 1 || p.sequence.count > 1 || p.group.count > 1 || !hopper_compiled(device)) return false;
  if (!map_rows(&grid->keys, p, p.k) || !map_rows(&grid->values, p, p.v)) return false;
  const int stages = (p.length + kHopperKeys - 1) / kHopperKeys;
  const int tiles = (p.members + kHopperQueries - 1) / kHopperQueries;
  grid->stages = stages <= kHopperStages ? stages : kHopperStages;
  grid->blocks = Blocks(p.batch, p.groups, stages <= kHopperStages ? 1 : (tiles + 1) / 2, p.heads);
  grid->count = grid->blocks.count;
  return grid->count <= INT32_MAX;
}

template <class T, int D>
int32_t launch_hopper(const Problem& p, const HopperGrid& grid, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr auto kernel = hopper_forward_kernel<T, D>;
  const char* name = "hopper_forward";
  if (int32_t status = allow_shared(kernel, name, allowed, Stages<T, D>::bytes(kHopperStages))) return status;
  return launch(name, kernel, p, grid, kHopperThreads, Stages<T, D>::bytes(grid.stages), stream);
}

template <class T>
int32_t hopper_forward(const Problem& p, const HopperGrid& grid, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_hopper<T, 64>(p, grid, stream) : launch_hopper<T, 128>(p, grid, stream);
}

}  // namespace tsk
