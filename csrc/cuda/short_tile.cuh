// SPDX-License-Identifier: Apache-2.0
// A warp's tile of short sequences: its place, rows, products and softmax.
//
// A warp has one head of 16 rows: as many whole sequences as fit. Lane 4 g + t holds rows g (`a`) and g + 8 (`b`), of
// each elements 32 c + 8 t + 0..7 for every c: one 16-byte load. Register 4 c + r has 32 c + 8 t + 2 r + {0, 1}.
//   q k^T:  both operands permute the head dimension alike, so the registers are the fragments as they are.
//   p v:    a transpose of each register makes the other fragment. Its column n is element
//           32 c + 8 (n / 2) + 2 r + n % 2, so that the sums of four registers are eight consecutive elements of rows
//           g and g + 8: one 16-byte store.
//   p:      sums of a product are in the layout of a left operand. p^T takes transposes, the two off-diagonal blocks
//           swapped.
//
// Scores of two sequences are discarded, but products with them still meet the neighbour's rows with weight zero, and
// zero times NaN is NaN. Where no sequence reaches from rows 0-7 into rows 8-15, each half has products of its own and
// knows nothing of the other; where that is not enough and something is not finite, the last products are done for one
// sequence at a time.
#pragma once
#include "matrix.cuh"

namespace tsk {

constexpr int kShortRows = 16;  // of a warp
constexpr int kShortWarps = 4;  // of a block, one head each

// Sequences of a half of the tile, where a kernel is made for an M that divides its 8 rows; else 0.
template <int MEMBERS>
constexpr int kHalfPack = MEMBERS >= 1 && MEMBERS <= 8 ? 8 / (MEMBERS ? MEMBERS : 1) : 0;

// A 1-D grid over batch x tiles x fours of heads, the last fastest.
struct ShortGrid {
  Divisor heads, tiles;
  uint32_t pack, inverse;  // sequences of a tile; 256 / M rounded up: r * inverse / 256 is r / M for r < 16
  int64_t count;

  __host__ explicit ShortGrid(const Problem& p) : pack(kShortRows / p.members), inverse((255 + p.members) / p.members) {
    const int64_t fours = (int64_t(p.heads) + kShortWarps - 1) / kShortWarps, n = (p.groups + int64_t(pack) - 1) / pack;
    heads = Divisor(uint32_t(fours)), tiles = Divisor(uint32_t(n));
    count = p.batch * fours * n;
  }
};

// What one of the 16 rows is. MEMBERS: M without a class row where a kernel is made for it (1, 2, 4, 8, 16),
// else 0.
struct ShortRow {
  int sequence, member, group;  // sequence: of the tile
  int32_t token;
  bool exists;
};

// All but the token.
template <int MEMBERS>
DEVICE ShortRow short_row(const Problem& p, int tile, int index) {
  ShortRow row;
  row.sequence = index / MEMBERS, row.member = index % MEMBERS;
  row.group = tile * (kShortRows / MEMBERS) + row.sequence;
  row.exists = MEMBERS == kShortRows || row.group < p.groups;
  if (!row.exists) row.group = 0;  // an address there is
  return row;
}

DEVICE ShortRow short_row(const Problem& p, const ShortGrid& grid, int tile, int index) {
  ShortRow row;
  row.sequence = int(uint32_t(index) * grid.inverse >> 8), row.member = index - row.sequence * p.members;
  row.group = tile * int(grid.pack) + row.sequence;
  row.exists = uint32_t(row.sequence) < grid.pack && row.group < p.groups;
  if (!row.exists) row.group = 0;
  row.token = member_row(p, group_row(p, row.group), row.member);
  return row;
}

// The warp's place in the call, and its lane's.
template <int MEMBERS>
struct ShortTile {
  int batch, head, g, t;
  bool first_tile;  // of the clip
  ShortRow a, b;
  uint32_t seen;  // MEMBERS == 0: bit 4 n + i, whether element i of the sums of keys 8 n to 8 n + 7 is a score

  DEVICE ShortTile(const Problem& p, const ShortGrid& grid) {
    uint32_t four = blockIdx.x, tile = split(four, grid.heads);  // a remainder stays in the first argument
    batch = int(split(tile, grid.tiles)), first_tile = tile == 0;
    const int lane = threadIdx.x & 31;
    head = int(four) * kShortWarps + int(threadIdx.x >> 5), g = lane >> 2, t = lane & 3;
    if constexpr (MEMBERS != 0) {
      // One walk where both rows are the same member of two groups, one where they are two members of the same group.
      a = short_row<MEMBERS>(p, int(tile), g), b = short_row<MEMBERS>(p, int(tile), g + 8);
      const int32_t start = group_row(p, a.group), step = p.sequence.walk(a.member);
      a.token = start + step;
      b.token = MEMBERS == kShortRows ? start + p.sequence.walk(b.member) : group_row(p, b.group) + step;
    } else {
      a = short_row(p, grid, int(tile), g), b = short_row(p, grid, int(tile), g + 8);
    }
    seen = 0;
    if constexpr (MEMBERS == 0)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const ShortRow& row = i & 2 ? b : a;
        const int key = int(uint32_t(2 * t + (i & 1) + 8 * (i >> 2)) * grid.inverse >> 8);
        seen |= uint32_t(asks(p, row) && key == row.sequence) << i;
      }
  }

  // Whether a row is a query: the class row is none for kKey.
  static DEVICE bool asks(const Problem& p, const ShortRow& row) {
    return row.exists && (MEMBERS != 0 || p.role != kKey || row.member != 0);
  }
  // Whether a row is the class row.
  static DEVICE bool is_class(const Problem& p, const ShortRow& row) {
    return MEMBERS == 0 && p.role != kNoMember && row.member == 0;
  }
  // Whether a row's turn has come: see by_sequence().
  static DEVICE bool takes_part(const ShortRow& row, int part) {
    constexpr int kHalf = kHalfPack<MEMBERS>;
    return part < 0 || (kHalf ? row.sequence % (kHalf ? kHalf : 1) : row.sequence) == part;
  }
  // Whether element i of the sums of keys 8 n to 8 n + 7 is a score of a query that exists.
  DEVICE bool sees(int n, int i) const {
    if constexpr (MEMBERS == 16) return true;
    if constexpr (MEMBERS == 8) return n == i / 2;
    if constexpr (MEMBERS != 0) return n == i / 2 && g / MEMBERS == (2 * t + (i & 1)) / MEMBERS;
    return seen >> (4 * n + i) & 1;
  }
};

// --- rows in and out ------------------------------------------------------------------------------------------------

// 16 rows in registers, as the head of this file says.
template <int D>
struct ShortRows {
  uint32_t a[D / 8], b[D / 8];
};

template <int D, class T>
DEVICE void load_short_row(uint32_t (&to)[D / 8], const T* row, bool exists) {
#pragma unroll
  for (int c = 0; c < D / 32; ++c) {
    const uint4 x = exists ? load16(row + 32 * c) : make_uint4(0, 0, 0, 0);
    to[4 * c] = x.x, to[4 * c + 1] = x.y, to[4 * c + 2] = x.z, to[4 * c + 3] = x.w;
  }
}

// Rows of one tensor; those of a query that is none are zero. A kernel made for an M has only queries, and rows that do
// not exist there need not be zero: they are of sequences of their own, which nobody stores.
template <class T, int D, int MEMBERS>
DEVICE ShortRows<D> load_short(const Problem& p, const ShortTile<MEMBERS>& tile, const Tensor& x, bool queries) {
  ShortRows<D> rows;
  const T* head = head_of<const T>(x, tile.batch, tile.head) + 8 * tile.t;
  const auto wanted = [&](const ShortRow& row) { return MEMBERS != 0 || (queries ? tile.asks(p, row) : row.exists); };
  load_short_row<D>(rows.a, row_of(head, x, tile.a.token), wanted(tile.a));
  load_short_row<D>(rows.b, row_of(head, x, tile.b.token), wanted(tile.b));
  return rows;
}

// Eight consecutive elements of row g (half 0) or g + 8 (half 1) from the sums of four registers.
template <class T>
DEVICE void store_short(T* to, const float (&sum)[4][4], int half, float factor) {
  uint32_t x[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) x[r] = pack<T>(sum[r][2 * half] * factor, sum[r][2 * half + 1] * factor);
  store16(to, make_uint4(x[0], x[1], x[2], x[3]));
}
DEVICE void store_short_part(float* to, const float (&sum)[4][4], int half, float factor) {
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __float_as_uint(sum[r + i / 2][2 * half + i % 2] * factor);
    store16(to + 2 * r, make_uint4(x[0], x[1], x[2], x[3]));
  }
}

// --- products -------------------------------------------------------------------------------------------------------

// sums[n] = x y^T for the rows of y from 8 n on, 16 x 8 each
template <class T, int D>
DEVICE void inner_short(float (&sums)[2][4], const ShortRows<D>& x, const ShortRows<D>& y) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0;
#pragma unroll
  for (int s = 0; s < D / 8; s += 2) {
    mma<T>(sums[0], x.a[s], x.b[s], x.a[s + 1], x.b[s + 1], y.a[s], y.a[s + 1]);
    mma<T>(sums[1], x.a[s], x.b[s], x.a[s + 1], x.b[s + 1], y.b[s], y.b[s + 1]);
  }
}

// The transpose of such weights. The off-diagonal blocks of separate halves are zero.
template <int MEMBERS>
DEVICE void transpose_weights(uint32_t (&to)[4], const uint32_t (&w)[4]) {
  to[0] = transposed(w[0]), to[3] = transposed(w[3]);
  to[1] = kHalfPack<MEMBERS> ? 0u : transposed(w[2]), to[2] = kHalfPack<MEMBERS> ? 0u : transposed(w[1]);
}

// w x of a tile, the rows of x with the masks keep_a and keep_b, and out: store(c, sums) for every 32 columns.
template <class T, int D, int MEMBERS, class Store>
DEVICE void mix_short(const uint32_t (&w)[4], const ShortRows<D>& x, uint32_t keep_a, uint32_t keep_b, Store store) {
#pragma unroll
  for (int c = 0; c < D / 32; ++c) {
    float sums[4][4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t a = transposed(x.a[4 * c + r] & keep_a), b = transposed(x.b[4 * c + r] & keep_b);
      if constexpr (kHalfPack<MEMBERS> != 0) {  // one left operand for both, of which a half counts
        float other[4] = {};
        mma8<T>(sums[r], w[0], w[3], a);
        mma8<T>(other, w[0], w[3], b);
        sums[r][2] = other[2], sums[r][3] = other[3];
      } else {
        mma<T>(sums[r], w[0], w[1], w[2], w[3], a, b);
      }
    }
    store(c, sums);
  }
}

template <class T, int D>
DEVICE uint32_t note_rows(uint32_t seen, const ShortRows<D>& x) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) seen = note_finite<T>(note_finite<T>(seen, x.a[i]), x.b[i]);
  return seen;
}

// once(part) for all sequences of a tile together (-1), or, where something is not finite, one after the other: those
// of separate halves at once.
template <int MEMBERS, class Once>
DEVICE void by_sequence(const ShortGrid& grid, bool fine, Once once) {
  const int parts = kHalfPack<MEMBERS> ? kHalfPack<MEMBERS> : MEMBERS ? 1 : int(grid.pack);
  for (int part = fine || parts == 1 ? -1 : 0;;) {
    once(part);
    if (part < 0 || ++part == parts) break;
  }
}

// --- softmax --------------------------------------------------------------------------------------------------------

// Largest scaled score, in units of log2, and sum of the exponentials, of rows g and g + 8
struct ShortSums {
  float top[2], total[2];
};

// s = 2^(s * scale - top), zero where a query does not see a key
template <int MEMBERS>
DEVICE ShortSums exponentials(float (&s)[2][4], const ShortTile<MEMBERS>& tile, float scale) {
  ShortSums out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = j >> 1, i = 2 * half + (j & 1);
      s[n][i] *= scale;
      if (tile.sees(n, i)) top = fmaxf(top, s[n][i]);
    }
    top = quad_max(top);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = j >> 1, i = 2 * half + (j & 1);
      s[n][i] = tile.sees(n, i) ? ex2(s[n][i] - top) : 0.0f;  // selected: the neighbours' scores may be NaN
      total += s[n][i];
    }
    out.top[half] = top, out.total[half] = quad_sum(total);
  }
  return out;
}

}  // namespace tsk
