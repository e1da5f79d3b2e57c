// SPDX-License-Identifier: Apache-2.0
// Row 0 where every group has a part of it: the parts are added in the order of the groups, a block for one row.
#pragma once
#include "problem.cuh"

namespace tsk {

constexpr int kClassThreads = 128;

// Row 0 of out from p.parts. kPerGroup: their mean, or sum weighted by p.cls_weights. kGlobal: one softmax over all
// groups, from the maxima and sums in p.sums; with p.stats the whole row's go to the class row of every group.
// Blocks(batch, 1, 1, heads).
template <class T>
__global__ void __launch_bounds__(kClassThreads)
    class_row_forward(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  const Place at = place_of(blocks, blockIdx.x);
  await_kernel_before();
  const int D = p.head_dim, G = p.groups;
  const int64_t first = part_index(p, at.batch, at.head, 0), step = p.heads;
  const float* parts = p.parts + first * D;
  float top = -INFINITY, total = 0;
  if (p.role == kGlobal) {
    const float* sums = p.sums + 2 * first;
    for (int g = 0; g < G; ++g) top = fmaxf(top, sums[2 * step * g]);
    for (int g = 0; g < G; ++g) total = fmaf(expf(sums[2 * step * g] - top), sums[2 * step * g + 1], total);
    if (p.stats)
      for (int g = threadIdx.x; g < G; g += kClassThreads) {
        float* stats = p.stats + 2 * row_index(p, at.batch, at.head, g, 0);
        stats[0] = top, stats[1] = total;
      }
  }
  T* out = head_of<T>(p.out, at.batch, at.head);
  for (int d = threadIdx.x; d < D; d += kClassThreads) {
    float sum = 0;
    for (int g = 0; g < G; ++g) {
      float share = 1;
      if (p.role == kGlobal)
        share = expf(p.sums[2 * (first + step * g)] - top);
      else if (p.cls_weights)
        share = class_share(p, at.batch, g);
      sum = fmaf(share, parts[step * g * D + d], sum);
    }
    if (p.role == kGlobal)
      sum /= total;
    else if (!p.cls_weights)
      sum /= float(G);
    from_float(out[d], sum);
  }
}

// Row 0 of dq, dk and dv from p.parts; for kKey that of dq is zero. Blocks(batch, 1, 3, heads).
template <class T>
__global__ void __launch_bounds__(kClassThreads)
    class_row_backward(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  const Place at = place_of(blocks, blockIdx.x);
  await_kernel_before();
  const int D = p.head_dim;
  const float* parts = p.parts + (3 * part_index(p, at.batch, at.head, 0) + at.tile) * D;
  const int64_t step = 3 * int64_t(p.heads) * D;
  T* row = head_of<T>(at.tile == 0 ? p.dq : at.tile == 1 ? p.dk : p.dv, at.batch, at.head);
  for (int d = threadIdx.x; d < D; d += kClassThreads) {
    float sum = 0;
    if (at.tile > 0 || p.role >= kPerGroup)
      for (int g = 0; g < p.groups; ++g) sum += parts[step * g + d];
    from_float(row[d], sum);
  }
}

// Zeros for row 0 of out, or of dq, dk and dv, of a clip without sequences. Blocks(batch, 1, 1 or 3, heads).
template <class T>
__global__ void __launch_bounds__(kClassThreads)
    class_row_zero(const __grid_constant__ Problem p, const __grid_constant__ Blocks blocks) {
  const Place at = place_of(blocks, blockIdx.x);
  const bool forward = blocks.tiles.size == 1;
  T* row = head_of<T>(forward ? p.out : at.tile == 0 ? p.dq : at.tile == 1 ? p.dk : p.dv, at.batch, at.head);
  for (int d = threadIdx.x; d < p.head_dim; d += kClassThreads) from_float(row[d], 0.f);
}

template <class T>
int32_t class_forward(const Problem& p, cudaStream_t stream) {
  const Blocks blocks(p.batch, 1, 1, p.heads);
  return launch("class_forward", class_row_forward<T>, p, blocks, kClassThreads, 0, stream, true);
}

template <class T>
int32_t class_backward(const Problem& p, cudaStream_t stream) {
  const Blocks blocks(p.batch, 1, 3, p.heads);
  return launch("class_backward", class_row_backward<T>, p, blocks, kClassThreads, 0, stream, true);
}

template <class T>
int32_t class_zero(const Problem& p, bool backward, cudaStream_t stream) {
  const Blocks blocks(p.batch, 1, backward ? 3 : 1, p.heads);
  return launch("class_zero", class_row_zero<T>, p, blocks, kClassThreads, 0, stream);
}

}  // namespace tsk
