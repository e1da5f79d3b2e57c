// SPDX-License-Identifier: Apache-2.0
// What compute capability 9.0 does asynchronously: barriers that count bytes, copies of boxes of a tensor, products of
// four warps, by the PTX ISA's words on mbarrier, cp.async.bulk.tensor and wgmma. Part of simt.h.
//
// A box lands, and a product reads shared memory, at a time drawn between its issue and the wait for it; until then the
// target holds NaN. Faults: reading or writing what the asynchronous side may not see yet (no fence), products whose
// four warps disagree, work nobody waited for at the end of a block, a tensor that the accelerator does not take.
#pragma once
#include "warp.h"

// The driver's types, as far as they are used.
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
struct alignas(64) CUtensorMap {  // opaque: 128 bytes
  const char* first;
  uint64_t steps[4];  // bytes
  uint32_t sizes[5];
  uint16_t box[5];
  bool encoded, swizzle;
};
#pragma GCC visibility push(hidden)

// Of 16-bit elements, five dimensions, without interleaving, 128-byte swizzle or none: what is documented to be refused
// is.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* first,
                                       const cuuint64_t* sizes, const cuuint64_t* steps, const cuuint32_t* box,
                                       const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fine = first && uintptr_t(map) % 64 == 0 && rank == 5 && uintptr_t(first) % 16 == 0;
  fine = fine && box[0] * 2 % 16 == 0 && box[0] * 2 <= (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 512);
  for (int i = 0; fine && i < 5; i++)
    fine = sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && every[i] == 1;
  for (int i = 0; fine && i < 4; i++) fine = steps[i] % 16 == 0 && steps[i] < uint64_t(1) << 40;
  if (!fine) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(first), {}, {}, {}, true, swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (int i = 0; i < 5; i++) map->sizes[i] = uint32_t(sizes[i]), map->box[i] = uint16_t(box[i]);
  for (int i = 0; i < 4; i++) map->steps[i] = steps[i];
  return CUDA_SUCCESS;
}

namespace simt {

// --- shared memory by address ----------------------------------------------------------------------------------------

// Dynamic shared memory begins here, which is a multiple of 128 and of nothing larger.
constexpr uint32_t kWindow = 0x480;

inline uint32_t shared_address(const void* p) {
  const char* c = static_cast<const char*>(p);
  need(c >= dyn && c <= dyn + dyn_bytes, "an address outside dynamic shared memory");
  return kWindow + uint32_t(c - dyn);
}
SIMT_HOT inline char* at_address(uint32_t address, uint32_t n) {
  need(address >= kWindow && address + n <= kWindow + dyn_bytes, "outside dynamic shared memory");
  return dyn + (address - kWindow);
}
// Of a 128-byte row the 16-byte chunks are exchanged by the row's place among eight.
SIMT_HOT inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// --- barriers --------------------------------------------------------------------------------------------------------

struct Barrier {
  int count, missing;  // arrivals of a phase, those still to come
  int64_t bytes;       // expected and not yet here
  uint32_t phase;
  bool visible;  // to copies
  const Fiber* made_by;
  std::vector<Fiber*> waiting;
};
inline std::map<const uint64_t*, Barrier> barriers_of_block;

inline Barrier& barrier_at(const uint64_t* p) {
  const auto found = barriers_of_block.find(p);
  need(found != barriers_of_block.end(), "a barrier that was not initialized");
  return found->second;
}
inline void barrier_init(uint64_t* p, int count) {
  need(uintptr_t(p) % 8 == 0 && count >= 1 && count < 1 << 20, "mbarrier.init of a bad address or count");
  at_address(shared_address(p), 8);
  barriers_of_block[p] = {count, count, 0, 0, false, cur, {}};
}
inline void settle(Barrier& b) {  // ends the phase if nothing is missing
  if (b.missing || b.bytes) return;
  b.phase++, b.missing = b.count;
  static List v;
  v.n = 0;
  for (Fiber* f : b.waiting) v.add(f);
  b.waiting.clear();
  release(v);
}
inline void barrier_arrive(uint64_t* p, int bytes) {
  Barrier& b = barrier_at(p);
  b.bytes += bytes, b.missing--;
  settle(b);
}
inline void barrier_wait(uint64_t* p, uint32_t parity) {
  while ((barrier_at(p).phase & 1) == parity) {
    cur->waits = "mbarrier.try_wait", cur->mask = 0;
    barrier_at(p).waiting.push_back(cur);
    next();
  }
}

// Ordinary writes of this thread are seen by copies and products from now on.
inline bool fenced_async;
inline void fence_async() {
  for (auto& [p, b] : barriers_of_block) b.visible |= b.made_by == cur;
  fenced_async = true;
}

// --- copies ----------------------------------------------------------------------------------------------------------

struct Box {
  uint32_t to;
  CUtensorMap map;
  uint64_t* barrier;
  int at[5];
};
inline std::vector<Box> boxes;     // under way
inline std::vector<char> by_copy;  // of each 16 bytes of shared memory, whether a copy wrote them
inline uint32_t row_bytes(const CUtensorMap& m) { return 2u * m.box[0]; }

// Each row of the box, [place in shared memory, coordinates].
template <class Row>
void each_row(const Box& b, Row row) {
  const CUtensorMap& m = b.map;
  uint32_t to = b.to;
  for (int e = 0; e < m.box[4]; e++)
    for (int d = 0; d < m.box[3]; d++)
      for (int c = 0; c < m.box[2]; c++)
        for (int r = 0; r < m.box[1]; r++, to += row_bytes(m)) {
          const int64_t at[5] = {b.at[0], b.at[1] + r, b.at[2] + c, b.at[3] + d, b.at[4] + e};
          row(to, at);
        }
}
inline void land_box(const Box& b) {
  const CUtensorMap& m = b.map;
  int64_t bytes = 0;
  each_row(b, [&](uint32_t to, const int64_t (&at)[5]) {
    alignas(16) char row[512] = {};
    const char* from = m.first;
    bool inside = true;
    for (int i = 1; i < 5; i++) inside &= at[i] >= 0 && at[i] < m.sizes[i], from += at[i] * int64_t(m.steps[i - 1]);
    for (int i = 0; inside && i < m.box[0]; i++)
      if (at[0] + i >= 0 && at[0] + i < m.sizes[0]) memcpy(row + 2 * i, from + 2 * (at[0] + i), 2);
    for (uint32_t i = 0; i < row_bytes(m); i += 16) {
      const uint32_t place = m.swizzle ? swizzled(to + i) : to + i;
      memcpy(at_address(place, 16), row + i, 16);
      by_copy[(place - kWindow) / 16] = 1;
    }
    bytes += row_bytes(m);
  });
  Barrier& barrier = barrier_at(b.barrier);
  barrier.bytes -= bytes;
  settle(barrier);
}
inline void copy_box(void* to, const CUtensorMap& map, uint64_t* barrier, const int (&at)[5]) {
  need(map.encoded && uintptr_t(&map) % 64 == 0, "cp.async.bulk.tensor with something that is no tensor map");
  need(barrier_at(barrier).visible, "cp.async.bulk.tensor with a barrier that no fence.proxy.async has made visible");
  Box b{shared_address(to), map, barrier, {at[0], at[1], at[2], at[3], at[4]}};
  need(b.to % 128 == 0, "cp.async.bulk.tensor to an address that is no multiple of 128");
  each_row(b, [&](uint32_t to, const int64_t (&)[5]) { memset(at_address(to, row_bytes(map)), 0xFF, row_bytes(map)); });
  boxes.push_back(b);
}
// Lands one box, any of those under way; false if there is none. Called when a thread is chosen.
inline bool async_progress(bool must) {
  if (boxes.empty()) return false;
  if (!must && (copies == Copies::deferred || (copies == Copies::random && rng() % 4))) return false;
  const size_t i = seed ? rng() % boxes.size() : 0;
  const Box b = boxes[i];
  boxes.erase(boxes.begin() + i);
  land_box(b);
  return true;
}

// --- products --------------------------------------------------------------------------------------------------------

struct Product {
  uint32_t a[32][4];
  size_t sums;  // index in Products::sums
  uint64_t b;
  bool add;
  void (*run)(const Product&, float (*)[32]);
  int group;
};
struct Sums {  // N / 2 floats of each lane: where they come from, and what they are meanwhile
  float* registers[32];
  int n, group;  // group: the last that changes them; -1: given back
  float x[32][32];
};
struct Products {  // of one warp
  std::vector<Product> queue;
  std::vector<Sums> sums;
  std::vector<std::pair<uint64_t, int>> issued;  // operand and shape of every product, to be compared
  int committed;
  bool fenced;
};
inline std::vector<Products> products;  // of the warps

// d(16xN) = A(16x16) B(16xN) (+ d), four warps have 64 rows. Products and sums in float64, rounded once.
template <bool HALF, int N, bool ROWS>
SIMT_HOT void multiply(const Product& p, float (*d)[32]) {
  const auto element = [](uint16_t x) SIMT_HOT { return double(HALF ? from_half(x) : from_bfloat16(x)); };
  const auto field = [&](int bit) { return uint32_t(p.b >> bit & 0x3FFF) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  need(p.b >> 62 == 1 && !(p.b >> 49 & 7), "only descriptors of 128-byte swizzle without a base offset are known");
  need(!(start & 0x380), "wgmma of rows that begin within eight, without a base offset");
  double A[16][16], B[16][N];
  for (int n = 0; n < N; n++)
    for (int k = 0; k < 16; k++) {
      const uint32_t to =
          ROWS ? n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride : n % 8 * 128 + n / 8 * stride + k * 2;
      const uint32_t address = swizzled(start + to);
      uint16_t x;
      memcpy(&x, at_address(address, 2), 2);
      need(by_copy[(address - kWindow) / 16] || fenced_async, "wgmma reads what was written without fence.proxy.async");
      B[k][n] = element(x);
    }
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 4; r++)
      for (int e = 0; e < 2; e++)
        A[(l >> 2) + 8 * (r & 1)][2 * (l & 3) + e + 8 * (r >> 1)] = element(uint16_t(p.a[l][r] >> 16 * e));
  for (int i = 0; i < 16; i++) {
    double D[N] = {};
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < N; j++) D[j] += A[i][k] * B[k][j];
    for (int j = 0; j < N; j++) {
      float& to = d[4 * (i & 7) + j % 8 / 2][j / 8 * 4 + 2 * (i >> 3) + j % 2];
      to = float((p.add ? to : 0.0f) + D[j]);
    }
  }
}

inline Products& products_here() { return products[cur->warp - warps.data()]; }

// Executes the products of groups before `end`, and gives back the sums that no later one changes.
inline void finish_products(Products& w, int end, bool give) {
  size_t n = 0;
  for (; n < w.queue.size() && w.queue[n].group < end; n++) w.queue[n].run(w.queue[n], w.sums[w.queue[n].sums].x);
  w.queue.erase(w.queue.begin(), w.queue.begin() + n);
  if (!give) return;
  for (Sums& s : w.sums) {
    if (s.group < 0 || s.group >= end) continue;
    for (int l = 0; l < 32; l++) memcpy(s.registers[l], s.x[l], s.n * sizeof(float));
    s.group = -1, w.fenced = false;
  }
  while (!w.sums.empty() && w.sums.back().group < 0) w.sums.pop_back();  // products name theirs by their place
}

struct ProductIn {
  float* d;
  uint32_t a[4];
  uint64_t b;
  bool add;
};
template <bool HALF, int N, bool ROWS>
void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
  const ProductIn mine{&d[0][0], {a[0], a[1], a[2], a[3]}, b, add};
  meet<int>("wgmma.mma_async", ~0u, mine, [](const ProductIn* const* in, int** out, unsigned m) {
    need(m == ~0u && warps.size() % 4 == 0, "wgmma needs all lanes of four warps");
    Products& w = products_here();
    Product p{{}, 0, in[0]->b, in[0]->add, multiply<HALF, N, ROWS>, w.committed};
    while (p.sums < w.sums.size() && (w.sums[p.sums].group < 0 || w.sums[p.sums].registers[0] != in[0]->d)) p.sums++;
    if (p.sums == w.sums.size()) {
      need(w.fenced, "wgmma of registers that no wgmma.fence has handed over");
      w.sums.push_back({{}, N / 2, 0, {}});
      for (int l = 0; l < 32; l++) {
        w.sums.back().registers[l] = in[l]->d;
        memcpy(w.sums.back().x[l], in[l]->d, N / 2 * sizeof(float));
      }
    }
    Sums& s = w.sums[p.sums];
    need(s.n == N / 2, "wgmma of sums that another shape is under way for");
    s.group = w.committed;
    for (int l = 0; l < 32; l++) {
      need(in[l]->b == p.b && in[l]->add == p.add, "the lanes of a wgmma disagree");
      memcpy(p.a[l], in[l]->a, sizeof p.a[l]);
      memset(in[l]->d, 0xFF, N / 2 * sizeof(float));
      *out[l] = 0;
    }
    w.issued.push_back({p.b, 2 * N + ROWS});
    w.queue.push_back(p);
    if (copies == Copies::immediate || (copies == Copies::random && rng() & 1))
      finish_products(w, w.committed + 1, false);
  });
}
// For all lanes of a warp together
template <class Op>
void by_warp(const char* what, int value, Op) {
  meet<int>(what, ~0u, value, [](const int* const* in, int** out, unsigned m) {
    need(m == ~0u, "wgmma needs all lanes");
    Op{}(products_here(), *in[0]);
    for (int l = 0; l < 32; l++) *out[l] = 0;
  });
}
inline void wgmma_fence() {
  by_warp("wgmma.fence", 0, [](Products& w, int) { w.fenced = true; });
}
inline void wgmma_commit() {
  by_warp("wgmma.commit_group", 0, [](Products& w, int) { w.committed++; });
}
inline void wgmma_wait(int left) {
  by_warp("wgmma.wait_group", left, [](Products& w, int left) { finish_products(w, w.committed - left, true); });
}

// --- a block ---------------------------------------------------------------------------------------------------------

inline void async_start() {
  barriers_of_block.clear(), boxes.clear();
  by_copy.assign((dyn_bytes + 15) / 16, 0);
  fenced_async = false;
  products.assign(warps.size(), Products());
}
inline void async_end() {
  need(boxes.empty(), "a block ended before its copies had landed");
  for (size_t i = 0; i < products.size(); i++) {
    for (const Sums& s : products[i].sums) need(s.group < 0, "a block ended before its products were waited for");
    need(products[i].issued == products[i / 4 * 4].issued, "the four warps of a wgmma did not all execute it");
  }
}

}  // namespace simt
#pragma GCC visibility pop
