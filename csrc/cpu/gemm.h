// SPDX-License-Identifier: Apache-2.0
// The one matrix product of this library: C[M x N] (+)= A[M x K] B[K x N], everything in cache, B and C packed rows.
//
// A is read one element at a time and may be strided either way, so that P^T dO needs no transposed copy of P. A tile
// of C stays in registers for the whole of K: MR x NV vectors, MR broadcasts and NV loads per step.
#pragma once
#include "simd.h"

namespace tsk::TSK_ISA {

#if TSK_VECTOR_BYTES == 64
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers
#endif
constexpr int64_t kDepth =
    96;  // K is cut so that a strip of B (kDepth x 4 vectors, 24 KB) stays in the first-level cache

template <class C, int MR, int NV>
TSK_INLINE void tile(int64_t K, const C* __restrict a, int64_t a_row, int64_t a_col, const C* __restrict b,
                     int64_t b_row, C* __restrict c, int64_t c_row, bool add) {
  constexpr int W = kWidth<C>;
  Vec<C> acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[i][n] = Vec<C>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<C> row[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) row[n] = load(b + k * b_row + n * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      Vec<C> x = splat(a[i * a_row + k * a_col]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[i][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      C* y = c + i * c_row + n * W;
      store(y, add ? load(y) + acc[i][n] : acc[i][n]);
    }
}

// Cuts n into the fewest parts of at most `limit`, as even as can be: the size of the first one.
TSK_INLINE int64_t even_part(int64_t n, int64_t limit) {
  const int64_t parts = (n + limit - 1) / limit;
  return parts ? (n + parts - 1) / parts : 0;
}

template <class C, int NV>
void strip(int64_t M, int64_t K, const C* a, int64_t a_row, int64_t a_col, const C* b, int64_t b_row, C* c,
           int64_t c_row, bool add) {
  while (M > 0) {
    const int64_t rows = even_part(M, kTileRows);  // 8 rows are 4 + 4, not 6 + 2
    switch (rows) {
      case 6:
        tile<C, 6, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
      case 5:
        tile<C, 5, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
      case 4:
        tile<C, 4, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
      case 3:
        tile<C, 3, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
      case 2:
        tile<C, 2, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
      default:
        tile<C, 1, NV>(K, a, a_row, a_col, b, b_row, c, c_row, add);
        break;
    }
    M -= rows, a += rows * a_row, c += rows * c_row;
  }
}

// N is a multiple of the vector width. With `add` the product is added to C, else C is overwritten.
template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* a, int64_t a_row, int64_t a_col, const C* b, int64_t b_row, C* c,
          int64_t c_row, bool add) {
  constexpr int W = kWidth<C>;
  for (int64_t k = 0, depth; k < K; k += depth, add = true) {
    depth = even_part(K - k, kDepth);
    const C* ak = a + k * a_col;
    const C* bk = b + k * b_row;
    for (int64_t n = 0, vectors; n < N; n += vectors * W) {
      vectors = even_part((N - n) / W, kTileVectors);
      switch (vectors) {
        case 4:
          strip<C, 4>(M, depth, ak, a_row, a_col, bk + n, b_row, c + n, c_row, add);
          break;
        case 3:
          strip<C, 3>(M, depth, ak, a_row, a_col, bk + n, b_row, c + n, c_row, add);
          break;
        case 2:
          strip<C, 2>(M, depth, ak, a_row, a_col, bk + n, b_row, c + n, c_row, add);
          break;
        default:
          strip<C, 1>(M, depth, ak, a_row, a_col, bk + n, b_row, c + n, c_row, add);
          break;
      }
    }
  }
}

}  // namespace tsk::TSK_ISA
