// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: matrix instructions in the register layouts of the PTX ISA (lane = 4 g + t),
// cp.async, shuffles, votes, barriers. Part of simt.h.
#pragma once
#include <cmath>

#include "fibers.h"
#pragma GCC visibility push(hidden)

namespace simt {

SIMT_HOT inline float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SIMT_HOT inline uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
SIMT_HOT inline float from_bfloat16(uint16_t x) { return as_float(uint32_t(x) << 16); }
SIMT_HOT inline float from_half(uint16_t h) {
  uint32_t u = (h & 0x7FFFu) << 13;  // exponent and mantissa in place, the exponent short by 112
  u = (h & 0x7C00) == 0x7C00 ? u | 0x7F800000 : as_bits(as_float(u) * 0x1p112f);
  return as_float(u | (h & 0x8000u) << 16);
}
SIMT_HOT inline uint16_t to_bfloat16(float f) {
  const uint32_t u = as_bits(f);
  return f != f ? 0x7FFF : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
SIMT_HOT inline uint16_t to_half(float f) {  // round to nearest even; the addition of 0.5 rounds subnormal results
  const uint32_t x = as_bits(f), a = x & 0x7FFFFFFF;
  if (a > 0x7F800000) return 0x7FFF;
  uint32_t u = 0x7C00;
  if (a < 0x38800000)
    u = as_bits(as_float(a) + 0.5f) - 0x3F000000;
  else if (a < 0x477FF000)
    u = (a + 0xFFF + (a >> 13 & 1) - 0x38000000) >> 13;
  return uint16_t(u | (x >> 16 & 0x8000));
}

struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaOut {
  float d[4];
};
// D(16x8) = A(16x16) B(16x8) + C. Products and sums in float64, rounded once: hardware is a little less exact.
template <bool HALF>
MmaOut mma(const MmaIn& x) {
  return meet<MmaOut>("mma.sync", ~0u, x, [](const MmaIn* const* in, MmaOut** out, unsigned m) SIMT_HOT {
    need(m == ~0u, "mma.sync needs all 32 lanes");
    double A[16][16], B[16][8];
    const auto element = [](uint32_t r, int high) SIMT_HOT {
      const uint16_t x = uint16_t(r >> (16 * high));
      return double(HALF ? from_half(x) : from_bfloat16(x));
    };
    for (int l = 0; l < 32; l++) {
      const int g = l >> 2, t = l & 3;
      for (int e = 0; e < 2; e++) {
        for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][2 * t + e + 8 * (r >> 1)] = element(in[l]->a[r], e);
        for (int r = 0; r < 2; r++) B[2 * t + e + 8 * r][g] = element(in[l]->b[r], e);
      }
    }
    for (int i = 0; i < 16; i++) {
      double D[8] = {};
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) D[j] += A[i][k] * B[k][j];
      for (int j = 0; j < 8; j++) {
        const int l = 4 * (i & 7) + j / 2, r = 2 * (i >> 3) + j % 2;
        out[l]->d[r] = float(in[l]->c[r] + D[j]);
      }
    }
  });
}

// The transpose of one 8x8 matrix of 16-bit elements: lane 4 g + t holds elements 2 t and 2 t + 1 of row g.
inline uint32_t movmatrix_trans(uint32_t x) {
  return meet<uint32_t>("movmatrix", ~0u, x, [](const uint32_t* const* in, uint32_t** out, unsigned m) SIMT_HOT {
    need(m == ~0u, "movmatrix needs all 32 lanes");
    const auto at = [&](int r, int c) SIMT_HOT { return *in[4 * r + c / 2] >> (16 * (c & 1)) & 0xFFFF; };
    for (int l = 0; l < 32; l++) *out[l] = at(2 * (l & 3), l >> 2) | at(2 * (l & 3) + 1, l >> 2) << 16;
  });
}

template <int N>
struct Matrices {
  uint32_t r[N];
};
// N 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
template <int N, bool TRANS>
Matrices<N> ldmatrix(const void* row) {
  return meet<Matrices<N>>("ldmatrix", ~0u, row, [](const void* const* const* in, Matrices<N>** out, unsigned m) {
    need(m == ~0u, "ldmatrix needs all 32 lanes");
    for (int i = 0; i < N; i++) {
      uint16_t M[8][8];
      for (int r = 0; r < 8; r++) {
        const void* p = *in[8 * i + r];
        need(uintptr_t(p) % 16 == 0, "ldmatrix row is not 16-byte aligned");
        memcpy(M[r], p, 16);
      }
      for (int l = 0; l < 32; l++) {
        const int r = l >> 2, c = 2 * (l & 3);
        out[l]->r[i] = TRANS ? M[c][r] | M[c + 1][r] << 16 : M[r][c] | M[r][c + 1] << 16;
      }
    }
  });
}

// cp.async of N bytes, of which the last N - n are filled with zeros. Until it lands the target holds NaN.
inline void land(const Copy& c) { memcpy(c.dst, c.data, c.n); }
template <int N>
void cp_async(void* dst, const void* src, int n = N) {
  static_assert(N == 4 || N == 8 || N == 16);
  need(uintptr_t(dst) % N == 0 && uintptr_t(src) % N == 0, "cp.async is misaligned");
  need(n >= 0 && n <= N, "cp.async of a negative size or past its own");
  Copy c{dst, N, {}};
  memcpy(c.data, src, n);
  if (copies == Copies::immediate || (copies == Copies::random && rng() & 1)) return land(c);
  memset(dst, 0xFF, N);
  cur->open.push_back(c);
}
inline void cp_async_commit() {
  cur->groups.push_back(std::move(cur->open));
  cur->open.clear();
}
inline void cp_async_wait(size_t left) {
  auto& groups = cur->groups;
  for (; groups.size() > left; groups.erase(groups.begin()))
    for (const Copy& c : groups[0]) land(c);
}

// A vector load or store whose address must be a multiple of its size.
template <class T>
T& aligned(const void* p) {
  need(uintptr_t(p) % sizeof(T) == 0, "misaligned address");
  return *static_cast<T*>(const_cast<void*>(p));
}

template <class T>
struct Shuffle {
  T v;
  int src;
};
template <class T>
T shuffle(const char* what, unsigned mask, T v, int src) {
  const auto op = [](const Shuffle<T>* const* in, T** out, unsigned m) SIMT_HOT {
    for (int l = 0; l < 32; l++) {
      if (!(m >> l & 1)) continue;
      const int s = in[l]->src;
      if (m >> s & 1)
        *out[l] = in[s]->v;
      else
        memset(static_cast<void*>(out[l]), 0xFF, sizeof(T));  // undefined
    }
  };
  return meet<T>(what, mask, Shuffle<T>{v, src}, op);
}

}  // namespace simt

inline void __syncthreads() {
  simt::Fiber* me = simt::cur;
  me->waits = "__syncthreads", me->mask = 0;
  simt::barrier.add(me);
  if (simt::barrier.n == int(simt::alive)) simt::release(simt::barrier);
  simt::next();
}
inline void __syncwarp(unsigned mask = ~0u) {
  simt::meet<int>("__syncwarp", mask, 0, [](const int* const*, int** out, unsigned m) {
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) *out[l] = 0;
  });
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int width = 32) {
  const int l = simt::cur->lane;
  return simt::shuffle("__shfl_sync", m, v, (l & ~(width - 1)) | (s & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32) {
  const int l = simt::cur->lane, s = l ^ x;
  return simt::shuffle("__shfl_xor_sync", m, v, s <= (l | (width - 1)) ? s & 31 : l);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32) {
  const int l = simt::cur->lane, s = l - int(d);
  return simt::shuffle("__shfl_up_sync", m, v, s >= (l & ~(width - 1)) ? s : l);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32) {
  const int l = simt::cur->lane, s = l + int(d);
  return simt::shuffle("__shfl_down_sync", m, v, s <= (l | (width - 1)) ? s : l);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return simt::meet<unsigned>("__ballot_sync", mask, p, [](const int* const* in, unsigned** out, unsigned m) {
    unsigned b = 0;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) b |= unsigned(*in[l] != 0) << l;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) *out[l] = b;
  });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
#pragma GCC visibility pop
