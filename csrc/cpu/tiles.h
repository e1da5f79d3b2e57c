// SPDX-License-Identifier: Apache-2.0
// Products on matrix units (AMX): tiles of 16 rows, bfloat16 factors, float32 sums. One instruction multiplies 16 x 32
// by 32 x 16, sixteen times what a vector unit does in that time.
//
// The second factor is read in pairs: a 32-bit word holds rows k and k + 1 of one column. Memory is padded to whole
// tiles. What lies behind the depth of a product has to be zero in both factors; what lies behind its rows and columns
// only reaches results that nobody reads.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__)
namespace tsk::TSK_ISA {

constexpr int64_t kTile = 16;   // rows of a tile; columns of sums
constexpr int64_t kDeep = 32;   // depth of a tile
constexpr int64_t kWords = 16;  // words of a row of one

typedef uint32_t Word;

TSK_INLINE int64_t whole_tiles(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

// Padded sizes of a sequence's attention, and the memory it takes.
struct TileSizes {
  static constexpr int64_t kRows = 64;  // of a block of queries
  int64_t keys, depth_keys;             // as rows and columns, and as the depth of a product
  int64_t dim, depth_dim;
  int64_t block;

  TileSizes(int64_t n_keys, int64_t D, int64_t queries)
      : keys(whole_tiles(n_keys, kTile)),
        depth_keys(whole_tiles(n_keys, kDeep)),
        dim(whole_tiles(D, kTile)),
        depth_dim(whole_tiles(D, kDeep)),
        block(queries < kRows ? whole_tiles(queries, kDeep) : kRows) {}

  // Floats of one worker, each of up to 20 parts rounded up to 64 bytes.
  int64_t scratch(bool backward) const {
    const int64_t packed = depth_keys * depth_dim, rows = block * depth_dim, square = block * depth_keys;
    return (backward ? 5 * packed + 4 * rows + 4 * square + depth_dim : 3 * packed + 2 * rows + 2 * square) + 20 * 16;
  }

  template <class E, class S>
  E* take(S& scratch, int64_t n) const {
    return reinterpret_cast<E*>(scratch.take((n * int64_t(sizeof(E)) + 3) / 4));
  }
};

// The compiler does not know what a tile's load reads, nor how much a configuration is.
TSK_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// Eight full tiles, for as long as it lives: a thread's tiles are set up, and given back.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; 16 x bytes of a row from 16 on, 8 x rows from 48 on
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    settle();
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// R x N tiles of sums, in tiles 0 to 3; factors in 4 to 7.
template <int R, int N>
TSK_INLINE void product_of_tiles(int64_t K, const BFloat16* a, int64_t a_row, const Word* b, int64_t b_row, float* c,
                                 int64_t c_row, bool add) {
  const int64_t a_bytes = a_row * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (N > 1) _tile_loadd(1, c + kTile, c_bytes);
    if (R > 1) _tile_loadd(2, c + kTile * c_row, c_bytes);
    if (R > 1 && N > 1) _tile_loadd(3, c + kTile * c_row + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (R > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kDeep) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k / 2 * b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) {
      _tile_loadd(7, b + k / 2 * b_row + kWords, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, a + kTile * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (N > 1) _tile_stored(1, c + kTile, c_bytes);
  if (R > 1) _tile_stored(2, c + kTile * c_row, c_bytes);
  if (R > 1 && N > 1) _tile_stored(3, c + kTile * c_row + kTile, c_bytes);
}

// C [M x N] (+)= A [M x K] B [K x N]: M and N multiples of 16, K of 32; A by rows, B [K / 2 x N] in pairs.
inline void tile_gemm(int64_t M, int64_t N, int64_t K, const BFloat16* a, int64_t a_row, const Word* b, int64_t b_row,
                      float* c, int64_t c_row, bool add) {
  settle();
  for (int64_t n = 0; n < N; n += 2 * kTile)
    for (int64_t m = 0; m < M; m += 2 * kTile) {
      const BFloat16* am = a + m * a_row;
      float* cm = c + m * c_row + n;
      const bool tall = m + kTile < M, wide = n + kTile < N;
      if (tall && wide)
        product_of_tiles<2, 2>(K, am, a_row, b + n, b_row, cm, c_row, add);
      else if (tall)
        product_of_tiles<2, 1>(K, am, a_row, b + n, b_row, cm, c_row, add);
      else if (wide)
        product_of_tiles<1, 2>(K, am, a_row, b + n, b_row, cm, c_row, add);
      else
        product_of_tiles<1, 1>(K, am, a_row, b + n, b_row, cm, c_row, add);
    }
  settle();
}

// to [columns x rows] = from [rows x columns], words; both multiples of 16.
inline void transpose_words(Word* to, int64_t to_row, const Word* from, int64_t from_row, int64_t rows,
                            int64_t columns) {
  for (int64_t i = 0; i < rows; i += kWords)
    for (int64_t j = 0; j < columns; j += kWords) {
      Vec<float> block[kWords];
      for (int64_t r = 0; r < kWords; ++r) memcpy(&block[r], from + (i + r) * from_row + j, 64);
      transpose<float>(block);
      for (int64_t r = 0; r < kWords; ++r) memcpy(to + (j + r) * to_row + i, &block[r], 64);
    }
}

// to [rows / 2 x columns]: rows 2i and 2i + 1 of each column in one word. rows is even, columns a multiple of 16.
inline void pair_rows(Word* to, int64_t to_row, const BFloat16* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += kWords) {
      const __m256i first = _mm256_loadu_si256((const __m256i*)(from + i * from_row + j));
      const __m256i second = _mm256_loadu_si256((const __m256i*)(from + (i + 1) * from_row + j));
      _mm512_storeu_si512(
          to + i / 2 * to_row + j,
          _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
    }
}

}  // namespace tsk::TSK_ISA
#endif
