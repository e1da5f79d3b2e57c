// SPDX-License-Identifier: Apache-2.0
// What all kernels on tensor cores share: bfloat16 and float16, head_dim 32, 64 or 128, rows aligned to 16 bytes.
#pragma once
#include <type_traits>

#include "problem.cuh"

namespace tsk {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

// The 16 x 16 weights of keys as a left operand.
template <class T>
DEVICE void pack_weights(uint32_t (&w)[4], const float (&p)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack<T>(p[i >> 1][2 * (i & 1)], p[i >> 1][2 * (i & 1) + 1]);
}

// Over the four lanes that hold a row
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Zeros for the class row of one head, which takes no part.
template <class T, int D>
DEVICE void store_zeros(const Tensor& x, int batch, int head) {
  T* row = head_of<T>(x, batch, head);
  for (int d = 8 * int(threadIdx.x & 31); d < D; d += 256) store16(row + d, make_uint4(0, 0, 0, 0));
}

// --- host -----------------------------------------------------------------------------------------------------------

// Whether every row of a tensor [B, S, H, D] of 16-bit elements starts at a multiple of 16 bytes.
inline bool rows_aligned(const Problem& p, const Tensor& x) {
  return uintptr_t(x.data) % 16 == 0 && (p.batch == 1 || x.batch % 8 == 0) && (p.heads == 1 || x.head % 8 == 0) &&
         (p.tokens == 1 || x.token % 8 == 0);
}

// Whether the kernels of tensor cores take a call's operands, those of a backward where p has them.
inline bool half_operands(const Problem& p) {
  if (p.dtype != TSK_BF16 && p.dtype != TSK_F16) return false;
  if (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128) return false;
  if (p.groups < 1 || p.heads < 1) return false;
  if (!rows_aligned(p, p.q) || !rows_aligned(p, p.k) || !rows_aligned(p, p.v)) return false;
  if (!p.dq.data) return rows_aligned(p, p.out);
  return rows_aligned(p, p.dout) && rows_aligned(p, p.dq) && rows_aligned(p, p.dk) && rows_aligned(p, p.dv);
}

// call(integral constant D)
template <class Call>
int32_t with_head_dim(const Problem& p, Call call) {
  if (p.head_dim == 32) return call(std::integral_constant<int, 32>());
  if (p.head_dim == 64) return call(std::integral_constant<int, 64>());
  return call(std::integral_constant<int, 128>());
}

}  // namespace tsk
