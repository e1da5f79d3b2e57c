// SPDX-License-Identifier: Apache-2.0
// A call as the kernels see it: tensors with strides, where a member of a sequence lives, which block does what.
//
// A sequence has M members: its L patches and, where the class row takes part, that row as member 0. A kernel gets the
// whole call by value, `const __grid_constant__ Problem p`, and its own `Blocks`.
#pragma once
#include <stdio.h>

#include "../abi.h"
#include "ptx.cuh"

#define EVERYWHERE __host__ __device__ __forceinline__

namespace tsk {

// What the class row is.
enum Role : int32_t {
  kNoMember = 0,  // modes "none", where there is none, and "exclude"
  kKey = 1,       // a key of every group
  kPerGroup = 2,  // a key and a query of every group
  kGlobal = 3     // a key of every group, and one query over all of them
};

// n / size for n below 2^31 without a division. A size of 0, of what is empty, is taken for 1.
struct Divisor {
  uint32_t size = 1, factor = 1, shift = 0;

  Divisor() = default;
  __host__ explicit Divisor(uint32_t n) : size(n ? n : 1) {
    while ((uint64_t(1) << shift) < size) ++shift;
    factor = uint32_t((((uint64_t(1) << shift) - size) << 32) / size + 1);
  }
  EVERYWHERE uint32_t operator()(uint32_t n) const { return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift; }
};

// n / d, leaving the remainder in n.
EVERYWHERE uint32_t split(uint32_t& n, const Divisor& d) {
  const uint32_t quotient = d(n);
  n -= quotient * d.size;
  return quotient;
}

// Up to three axes of a view, outermost first, without those of size 1.
struct Axes {
  int32_t count = 0;     // of axes
  int32_t step[3] = {};  // in token rows
  Divisor size[3];

  // Token rows to the i-th point.
  DEVICE int32_t walk(uint32_t i) const {
    if (count <= 1) return int32_t(i) * step[0];
    uint32_t outer = split(i, size[count - 1]);
    if (count == 2) return int32_t(outer) * step[0] + int32_t(i) * step[1];
    const uint32_t outermost = split(outer, size[1]);
    return int32_t(outermost) * step[0] + int32_t(outer) * step[1] + int32_t(i) * step[2];
  }
};

// [B, S, H, D], strides in elements. A token's is 32 bits: times a row number, one instruction gives 64.
struct Tensor {
  void* data;
  int64_t batch, head;
  int32_t token;
};

struct Problem {
  Tensor q, k, v, out, dout, dq, dk, dv;
  Axes group, sequence;
  int32_t batch, tokens, heads, head_dim;
  int32_t groups, length, members;  // G, L, M
  int32_t first;                    // token row of the first patch: 0 where there is no class row, else 1
  int32_t role;                     // Role
  int32_t dtype;                    // TskDtype
  float scale;                      // of the scores
  const float* cls_weights;         // [B, G] what a group counts for in the class row's output; null: 1 / G
  // Null where a call has none. parts: what each group has of the class row, forward [B, G, H, D], backward
  // [B, G, H, 3, D], see part_index(). sums: [B, G, H, 2] of that row in each group, in the forward of kGlobal, whose
  // parts are not divided by the sum.
  float* stats;       // [B, H, G, M, 2] largest score and sum of exponentials of each row, see row_index()
  const float* kept;  // backward, kPerGroup: the parts of the forward, which lie behind the stats, see keeps()
  float *parts, *sums;
  float* delta;  // backward, of each row: generic [B, H, G, M] sum(p * dp); streaming [B, H, G, M, 4], see there
  bool saved;    // backward: stats holds what the forward left
};

// --- where a row is -------------------------------------------------------------------------------------------------

// The first row of one head of a clip. Neither number is negative: a product with an unsigned one is shorter.
template <class T>
DEVICE T* head_of(const Tensor& x, int batch, int head) {
  return static_cast<T*>(x.data) + int64_t(uint32_t(batch)) * x.batch + int64_t(uint32_t(head)) * x.head;
}

// One row of it.
template <class T>
DEVICE T* row_of(T* head, const Tensor& x, int32_t row) {
  return head + int64_t(row) * x.token;
}

// Token row of the first patch of a group.
DEVICE int32_t group_row(const Problem& p, int group) { return p.first + p.group.walk(group); }

// Token row of a member of the group whose first patch is row `start`.
DEVICE int32_t member_row(const Problem& p, int32_t start, int member) {
  if (p.role == kNoMember) return start + p.sequence.walk(member);
  return member == 0 ? 0 : start + p.sequence.walk(member - 1);
}

// Into stats (times 2) and delta.
DEVICE int64_t row_index(const Problem& p, int batch, int head, int group, int member) {
  return ((int64_t(batch) * p.heads + head) * p.groups + group) * p.members + member;
}

// Into sums (times 2) and parts (times D; backward: 3 * D, of which dq, dk, dv have D each).
DEVICE int64_t part_index(const Problem& p, int batch, int head, int group) {
  return (int64_t(batch) * p.groups + group) * p.heads + head;
}

// What a group counts for in the class row's output, kPerGroup.
DEVICE float class_share(const Problem& p, int batch, int group) {
  return p.cls_weights ? p.cls_weights[int64_t(batch) * p.groups + group] : 1.f / float(p.groups);
}

// --- which block does what ------------------------------------------------------------------------------------------

// A 1-D grid over batch x groups x tiles x heads, heads fastest: neighbours read neighbouring memory.
struct Blocks {
  Divisor heads, tiles, groups;
  int64_t count;

  __host__ Blocks(int64_t batch, int64_t groups, int64_t tiles, int64_t heads)
      : heads(uint32_t(heads)),
        tiles(uint32_t(tiles)),
        groups(uint32_t(groups)),
        count(batch * groups * tiles * heads) {}
};

struct Place {
  int head, tile, group, batch;
};

DEVICE Place place_of(const Blocks& blocks, uint32_t block) {
  uint32_t head = block, tile = split(head, blocks.heads), group = split(tile, blocks.tiles);
  const uint32_t batch = split(group, blocks.groups);
  return {int(head), int(tile), int(group), int(batch)};
}

// --- elements -------------------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(float16 x) { return __half2float(x); }

DEVICE void from_float(float& to, float x) { to = x; }
DEVICE void from_float(bfloat16& to, float x) { to = __float2bfloat16(x); }
DEVICE void from_float(float16& to, float x) { to = __float2half(x); }

// --- the host's side ------------------------------------------------------------------------------------------------

inline thread_local char last_error[512] = "";

template <class... Args>
int32_t fail(int32_t status, const char* format, Args... args) {
  snprintf(last_error, sizeof last_error, format, args...);
  return status;
}

// Whether a kernel may start on the current device before the one before it has ended: where it was compiled for
// compute capability 9.0 or later. Code for an older one that the driver has translated for this device does not wait.
template <class Kernel>
bool starts_early(Kernel kernel) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion >= 90;
  cudaGetLastError();  // the launch will say what is wrong
  return false;
}

// Queues a kernel of a Problem and its Blocks, or a grid of its own. behind: it calls await_kernel_before(). Returns
// TSK_OK, or what fail() returned: the name and CUDA's error.
template <class Grid>
int32_t launch(const char* name, void (*kernel)(Problem, Grid), const Problem& p, const Grid& blocks, int threads,
               int shared_bytes, cudaStream_t stream, bool behind = false) {
  if (blocks.count > INT32_MAX) return fail(TSK_INVALID, "%s: more than 2^31 - 1 blocks", name);
  if (blocks.count == 0) return TSK_OK;
  if (behind && starts_early(kernel))
    LAUNCH_BEHIND(kernel, unsigned(blocks.count), unsigned(threads), size_t(shared_bytes), stream, p, blocks);
  else
    LAUNCH(kernel, unsigned(blocks.count), unsigned(threads), size_t(shared_bytes), stream, p, blocks);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess
             ? int32_t(TSK_OK)
             : fail(int32_t(error), "kernel %s: %s (CUDA error %d)", name, cudaGetErrorString(error), int(error));
}

}  // namespace tsk
