// SPDX-License-Identifier: Apache-2.0
// Sequences of at most 16 members (time attention) in registers: no shared memory, no barrier, no atomics, and a
// backward that needs neither the output nor statistics.
#pragma once
#include "short_tile.cuh"

namespace tsk {

// --- kernels --------------------------------------------------------------------------------------------------------

// Blocks that an SM is to hold: few enough that registers suffice for all rows of a tile at once. Left to itself the
// assembler spills to fit one block more.
constexpr int short_blocks(int D, int members, bool backward) {
  if (backward) return D == 128 ? 2 : 3;
  return D == 128 ? 4 : members == 0 ? 5 : 6;
}

template <class T, int D, int MEMBERS>
__global__ void __launch_bounds__(32 * kShortWarps, short_blocks(D, MEMBERS, false))
    short_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ShortGrid grid) {
  const ShortTile<MEMBERS> tile(p, grid);
  if (tile.head >= p.heads) return;
  const auto q = load_short<T, D>(p, tile, p.q, true);
  const auto k = load_short<T, D>(p, tile, p.k, false);
  const auto v = load_short<T, D>(p, tile, p.v, false);
  if (p.first == 1 && p.role <= kKey && tile.first_tile) store_zeros<T, D>(p.out, tile.batch, tile.head);
  float s[2][4];
  inner_short<T, D>(s, q, k);
  const ShortSums sums = exponentials(s, tile, p.scale * kLog2e);
  uint32_t w[4];
  pack_weights<T>(w, s);

  const auto finish = [&](const ShortRow& row, int half, int part, int c, const float (&sum)[4][4]) {
    if (!tile.asks(p, row) || !tile.takes_part(row, part)) return;
    const float factor = reciprocal(sums.total[half]);
    const int d = 32 * c + 8 * tile.t;
    if (tile.is_class(p, row))
      store_short_part(p.parts + part_index(p, tile.batch, tile.head, row.group) * D + d, sum, half, factor);
    else
      store_short(row_of(head_of<T>(p.out, tile.batch, tile.head) + d, p.out, row.token), sum, half, factor);
  };
  const bool fine = MEMBERS >= 8 || all_finite(note_rows<T, D>(0, v));
  by_sequence<MEMBERS>(grid, fine, [&](int part) {
    const uint32_t keep_a = tile.takes_part(tile.a, part) ? ~0u : 0, keep_b = tile.takes_part(tile.b, part) ? ~0u : 0;
    mix_short<T, D, MEMBERS>(w, v, keep_a, keep_b, [&](int c, const float (&sum)[4][4]) {
      finish(tile.a, 0, part, c, sum);
      finish(tile.b, 1, part, c, sum);
    });
  });
  if (p.stats && tile.t == 0)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ShortRow& row = half ? tile.b : tile.a;
      if (!tile.asks(p, row)) continue;
      float* to = p.stats + 2 * row_index(p, tile.batch, tile.head, row.group, row.member);
      to[0] = sums.top[half] * kLn2, to[1] = sums.total[half];
    }
}

template <class T, int D, int MEMBERS>
__global__ void __launch_bounds__(32 * kShortWarps, short_blocks(D, MEMBERS, true))
    short_backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ShortGrid grid) {
  const ShortTile<MEMBERS> tile(p, grid);
  if (tile.head >= p.heads) return;
  const auto q = load_short<T, D>(p, tile, p.q, true);
  const auto k = load_short<T, D>(p, tile, p.k, false);
  const auto v = load_short<T, D>(p, tile, p.v, false);
  const auto dout = load_short<T, D>(p, tile, p.dout, true);
  if (p.first == 1 && p.role == kNoMember && tile.first_tile) {
    store_zeros<T, D>(p.dq, tile.batch, tile.head);
    store_zeros<T, D>(p.dk, tile.batch, tile.head);
    store_zeros<T, D>(p.dv, tile.batch, tile.head);
  }
  float s[2][4], dp[2][4];
  inner_short<T, D>(s, q, k);
  const ShortSums sums = exponentials(s, tile, p.scale * kLog2e);
  inner_short<T, D>(dp, dout, v);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ShortRow& row = half ? tile.b : tile.a;
    const float factor = reciprocal(sums.total[half]);
    float delta = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = j >> 1, i = 2 * half + (j & 1);
      if (!tile.sees(n, i)) continue;
      s[n][i] *= factor;
      delta = fmaf(s[n][i], dp[n][i], delta);
    }
    delta = quad_sum(delta);
    // What a group counts for in the class row's output is a factor of that row's dout.
    const bool shared = MEMBERS == 0 && p.role == kPerGroup && row.member == 0 && row.exists;
    const float share = shared ? class_share(p, tile.batch, row.group) : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = j >> 1, i = 2 * half + (j & 1);
      if (MEMBERS == 0) s[n][i] *= share;
      dp[n][i] = tile.sees(n, i) ? s[n][i] * p.scale * (dp[n][i] - delta) : 0.0f;
    }
  }
  uint32_t w[4], ds[4], wt[4], dst[4];
  pack_weights<T>(w, s), pack_weights<T>(ds, dp);
  transpose_weights<MEMBERS>(wt, w), transpose_weights<MEMBERS>(dst, ds);

  const auto finish = [&](const Tensor& x, int which, const ShortRow& row, int half, int part, int c,
                          const float (&sum)[4][4]) {
    if (!(which == 0 ? tile.asks(p, row) : row.exists) || !tile.takes_part(row, part)) return;
    const int d = 32 * c + 8 * tile.t;
    if (tile.is_class(p, row))
      store_short_part(p.parts + (3 * part_index(p, tile.batch, tile.head, row.group) + which) * D + d, sum, half,
                       1.0f);
    else
      store_short(row_of(head_of<T>(x, tile.batch, tile.head) + d, x, row.token), sum, half, 1.0f);
  };
  const bool fine = MEMBERS >= 8 || all_finite(note_rows<T, D>(note_rows<T, D>(note_rows<T, D>(0, k), q), dout));
  by_sequence<MEMBERS>(grid, fine, [&](int part) {
    const uint32_t keep_a = tile.takes_part(tile.a, part) ? ~0u : 0, keep_b = tile.takes_part(tile.b, part) ? ~0u : 0;
    const auto product = [&](const Tensor& x, int which, const uint32_t (&left)[4], const ShortRows<D>& right) {
      mix_short<T, D, MEMBERS>(left, right, keep_a, keep_b, [&](int c, const float (&sum)[4][4]) {
        finish(x, which, tile.a, 0, part, c, sum);
        finish(x, which, tile.b, 1, part, c, sum);
      });
    };
    product(p.dq, 0, ds, k);
    product(p.dk, 1, dst, q);
    product(p.dv, 2, wt, dout);
  });
}

// --- host -----------------------------------------------------------------------------------------------------------

// Whether the kernels of this file take a call.
inline bool short_serves(const Problem& p) {
  return p.members >= 1 && p.members <= kShortRows && p.role != kGlobal && half_operands(p) &&
         ShortGrid(p).count <= INT32_MAX;
}

template <class T, int D, int MEMBERS>
int32_t launch_short(const Problem& p, bool backward, cudaStream_t stream) {
  const auto kernel = backward ? short_backward_kernel<T, D, MEMBERS> : short_forward_kernel<T, D, MEMBERS>;
  return launch(backward ? "short_backward" : "short_forward", kernel, p, ShortGrid(p), 32 * kShortWarps, 0, stream);
}

template <class T>
int32_t launch_short(const Problem& p, bool backward, cudaStream_t stream) {
  return with_head_dim(p, [&](auto D) {
    switch (p.role == kNoMember ? p.members : 0) {
      case 1:
        return launch_short<T, D(), 1>(p, backward, stream);
      case 2:
        return launch_short<T, D(), 2>(p, backward, stream);
      case 4:
        return launch_short<T, D(), 4>(p, backward, stream);
      case 8:
        return launch_short<T, D(), 8>(p, backward, stream);
      case 16:
        return launch_short<T, D(), 16>(p, backward, stream);
      default:
        return launch_short<T, D(), 0>(p, backward, stream);
    }
  });
}

// out [B, S, H, D]; of kPerGroup the class row's into p.parts instead. p.stats where it is not null.
template <class T>
int32_t short_forward(const Problem& p, cudaStream_t stream) {
  return launch_short<T>(p, false, stream);
}

// dq, dk, dv [B, S, H, D]; the class row's, where it is a member, into p.parts instead.
template <class T>
int32_t short_backward(const Problem& p, cudaStream_t stream) {
  return launch_short<T>(p, true, stream);
}

}  // namespace tsk
