// SPDX-License-Identifier: Apache-2.0
// Tests of hopper.h, as test_simt.cpp's: what is asynchronous, through ptx.cuh, against plain loops.
#include "testing.h"

namespace {

// Where element (row, column) of a panel is, in elements: the definition, apart from anything under test.
int place(int row, int column) { return 64 * row + 8 * ((column / 8) ^ (row & 7)) + column % 8; }

// The first panel in dynamic shared memory, whose beginning is no multiple of 1024.
template <class T>
T* panel_of(T* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024 / sizeof(T);
}

// --- products --------------------------------------------------------------------------------------------------------

// c(64xN) = 2 a(64x16) B, from 16 columns of N rows of a panel, or N columns of 16 rows.
enum Lack { kNothing, kFence, kAsyncFence, kWait, kCommit, kWarp };
template <class T, int N, bool ROWS, Lack LACK>
__global__ void product(const T* a, const T* panel, float* c, int first) {
  SHARED_DYN(T, shared);
  T* s = panel_of(shared);
  const int warp = threadIdx.x >> 5, g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3, row = 16 * warp + g;
  for (int i = threadIdx.x; i < 64 * 64; i += 128) s[place(i / 64, i % 64)] = panel[i];
  if (LACK != kAsyncFence) fence_async();
  __syncthreads();
  if (LACK == kWarp && warp == 2) return;
  const auto two = [&](int i, int k) { return uint32_t(a[16 * i + k].u) | uint32_t(a[16 * i + k + 1].u) << 16; };
  const uint32_t A[4] = {two(row, 2 * t), two(row + 8, 2 * t), two(row, 2 * t + 8), two(row + 8, 2 * t + 8)};
  const uint64_t b = ROWS ? panel_operand(s, first, 0) : panel_operand(s, 0, first);
  float d[N / 8][4];
  for (auto& x : d) x[0] = x[1] = x[2] = x[3] = 7;
  if (LACK != kFence) wgmma_fence();
  wgmma<T, N, ROWS>(d, A, b, false);
  wgmma<T, N, ROWS>(d, A, b, true);
  if (LACK != kCommit) wgmma_commit();
  if (LACK != kWait) wgmma_wait<0>();
  for (int j = 0; j < N / 8; j++)
    for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * N + 8 * j + 2 * t + i % 2] = d[j][i];
}

template <class T, int N, bool ROWS, Lack LACK = kNothing>
double product_error(int first) {
  Buffer<T> a(64 * 16), panel(64 * 64);
  Buffer<float> c(64 * N);
  for (int i = 0; i < a.n; i++) a[i] = T(float(uniform()));
  for (int i = 0; i < panel.n; i++) panel[i] = T(float(uniform()));
  if (run(product<T, N, ROWS, LACK>, 1, 128, 2 * 64 * 64 + 1024, (const T*)a.p, (const T*)panel.p, c.p, first))
    return -1;
  double worst = 0;
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < N; j++) {
      double want = 0;
      for (int k = 0; k < 16; k++)
        want += double(float(a[16 * i + k])) * float(ROWS ? panel[64 * (first + k) + j] : panel[64 * j + first + k]);
      const double error = fabs(2 * want - c[N * i + j]);
      if (!(error <= worst)) worst = error == error ? error : INFINITY;
    }
  return worst;
}
template <class T>
void products_of() {
  for (simt::copies = simt::Copies::random; int(simt::copies) < 3; simt::copies = simt::Copies(int(simt::copies) + 1))
    for (int first : {0, 16, 32, 48}) {
      const auto exact = [](double error) { return error >= 0 && error < 1e-5; };
      CHECK(exact(product_error<T, 16, false>(first)) && exact(product_error<T, 32, false>(first)));
      CHECK(exact(product_error<T, 48, false>(first)) && exact(product_error<T, 64, false>(first)));
      CHECK(exact(product_error<T, 64, true>(first)) && exact(product_error<T, 16, true>(first)));
    }
}

// --- boxes -----------------------------------------------------------------------------------------------------------

constexpr int kSizes[5] = {64, 7, 3, 2, 2}, kRows = 8;  // the rows of a box are one more than there are
CUtensorMap map_of(const void* first) {
  CUtensorMap map;
  const cuuint64_t sizes[5] = {64, 7, 3, 2, 2}, steps[4] = {3 * 2 * 128, 2 * 128, 128, 7 * 3 * 2 * 128};
  const cuuint32_t box[5] = {64, kRows, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
  CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(first), sizes, steps, box,
                               every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
  return map;
}
struct From {
  int at[5];
};
enum BoxLack { kAll, kNoFence, kNoWait, kNoBytes, kSkewed };
template <BoxLack LACK>
__global__ void box(const __grid_constant__ CUtensorMap map, const __grid_constant__ From from, uint16_t* out) {
  SHARED_DYN(uint16_t, shared);
  uint16_t* s = panel_of(shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(s + 64 * kRows);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    if (LACK != kNoFence) fence_async();
    barrier_expect(barrier, LACK == kNoBytes ? 128 * kRows + 2 : 128 * kRows);
    copy_box(LACK == kSkewed ? s + 8 : s, map, barrier, from.at);
  }
  __syncthreads();
  if (LACK != kNoWait) barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 64 * kRows; i += 32) out[i] = s[place(i / 64, i % 64)];
}
template <BoxLack LACK>
cudaError_t run_box(const Buffer<uint16_t>& x, Buffer<uint16_t>& out, const From& from) {
  return run(box<LACK>, 1, 32, 128 * kRows + 1024 + 8, map_of(x.p), from, out.p);
}
bool box_right(const Buffer<uint16_t>& x, Buffer<uint16_t>& out, const From& from) {
  bool fine = true;
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < 64; c++) {
      const int d = from.at[0] + c, row = from.at[1] + r;
      const bool inside = d >= 0 && d < 64 && row >= 0 && row < 7;
      const int at = ((from.at[4] * 7 + row) * 3 + from.at[2]) * 2 + from.at[3];
      fine &= out[64 * r + c] == (inside ? x.p[64 * at + d] : 0);
    }
  return fine;
}
void boxes() {
  Buffer<uint16_t> x(64 * 7 * 3 * 2 * 2), out(64 * kRows);
  for (int i = 0; i < x.n; i++) x[i] = uint16_t(1 + i % 65535);
  for (const From& from :
       {From{{0, 0, 0, 0, 0}}, From{{0, 5, 2, 1, 1}}, From{{0, -3, 1, 0, 1}}, From{{40, 0, 2, 1, 0}}})
    for (simt::seed = 0; simt::seed < 5; simt::seed++) {
      CHECK(run_box<kAll>(x, out, from) == cudaSuccess && box_right(x, out, from));
    }
  const From first{{0, 0, 0, 0, 0}};
  simt::copies = simt::Copies::deferred;  // what is read before the barrier says so has not landed
  CHECK(run_box<kNoWait>(x, out, first) == cudaErrorLaunchFailure && out[0] == 0xFFFF);
  CHECK(said(cudaErrorLaunchFailure, "a block ended before its copies had landed"));
}
void refused_tensors() {
  const auto code = [](size_t skew, cuuint64_t size, cuuint64_t step, cuuint32_t columns, cuuint32_t rows) {
    alignas(64) static char memory[64];
    CUtensorMap map;
    const cuuint64_t sizes[5] = {64, size, 1, 1, 1}, steps[4] = {step, 16, 16, 16};
    const cuuint32_t box[5] = {columns, rows, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
    return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, memory + skew, sizes, steps, box, every,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CHECK(code(0, 1, 128, 64, 256) == CUDA_SUCCESS && code(16, 9, 16, 8, 1) == CUDA_SUCCESS);
  CHECK(code(8, 1, 128, 64, 1) != CUDA_SUCCESS && code(0, 0, 128, 64, 1) != CUDA_SUCCESS);
  CHECK(code(0, 1, 136, 64, 1) != CUDA_SUCCESS && code(0, 1, 1ull << 40, 64, 1) != CUDA_SUCCESS);
  CHECK(code(0, 1, 128, 72, 1) != CUDA_SUCCESS && code(0, 1, 128, 64, 257) != CUDA_SUCCESS);
}

// --- barriers --------------------------------------------------------------------------------------------------------

// Numbers through a ring of two places, written by one warp and read by two: right with both barriers, wrong in almost
// every order without that of the places read.
template <bool EMPTY>
__global__ void ring(int* out) {
  SHARED_DYN(uint64_t, barriers);  // full, full, empty, empty
  int* places = reinterpret_cast<int*>(barriers + 4);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x < 4) barrier_init(barriers + threadIdx.x, threadIdx.x < 2 ? 32 : 2);
  __syncthreads();
  for (int i = 0; i < 9; i++) {
    const int at = i % 2, round = i / 2;
    if (warp == 0) {
      if (EMPTY && round) barrier_wait(barriers + 2 + at, (round - 1) & 1);
      places[32 * at + lane] = 100 * i + lane;
      barrier_arrive(barriers + at);
    } else {
      barrier_wait(barriers + at, round & 1);
      out[32 * (2 * i + warp - 1) + lane] = places[32 * at + 31 - lane];
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers + 2 + at);
    }
  }
}
template <bool EMPTY>
int wrong_rings() {
  int wrong = 0;
  for (simt::seed = 1; simt::seed <= 50; simt::seed++) {
    Buffer<int> out(32 * 18);
    bool bad = run(ring<EMPTY>, 1, 96, 32 + 64 * 4, out.p) != cudaSuccess;
    for (int i = 0; i < out.n; i++) bad |= out[i] != 100 * (i / 64) + 31 - i % 32;
    wrong += bad;
  }
  return wrong;
}
void barriers() {
  CHECK(wrong_rings<true>() == 0);
  CHECK(wrong_rings<false>() > 45);
}

// --- faults ----------------------------------------------------------------------------------------------------------

__global__ void no_barrier(int* out) {
  SHARED_DYN(uint64_t, barrier);
  barrier_arrive(barrier);
  *out = 1;
}
__global__ void shape_of_others(float* out) {
  SHARED_DYN(bfloat16, s);
  float d[8][4] = {};
  const uint32_t a[4] = {};
  fence_async(), wgmma_fence();
  wgmma<bfloat16, 64, false>(d, a, panel_operand(panel_of(s), 0, 0), false);
  wgmma<bfloat16, 16, false>(d, a, panel_operand(panel_of(s), 0, 0), false);
  out[threadIdx.x] = d[0][0];
}
__global__ void no_swizzle(float* out) {
  SHARED_DYN(bfloat16, s);
  float d[2][4] = {};
  const uint32_t a[4] = {};
  wgmma_fence();
  wgmma<bfloat16, 16, false>(d, a, panel_operand(s, 0, 0) & ~(3ull << 62), false);
  wgmma_commit(), wgmma_wait<0>();
  out[threadIdx.x] = d[0][0];
}
void faults() {
  Buffer<int> o(1);
  Buffer<float> f(128);
  Buffer<uint16_t> x(64 * 7 * 3 * 2 * 2), out(64 * kRows);
  const From first{{0, 0, 0, 0, 0}};
  const auto fails = [&](const char* text) {
    if (!said(cudaErrorLaunchFailure, text))
      check(false, text), printf("%s\n", cudaGetErrorString(cudaErrorLaunchFailure));
    CHECK((product_error<bfloat16, 16, false>(0) < 1e-5));  // the next launch is right
    CHECK(run_box<kAll>(x, out, first) == cudaSuccess && box_right(x, out, first));
  };
  for (simt::seed = 0; simt::seed < 10; simt::seed++) {
    CHECK((product_error<bfloat16, 64, false, kFence>(0) < 0)), fails("no wgmma.fence has handed over");
    CHECK((product_error<bfloat16, 64, false, kAsyncFence>(0) < 0)), fails("written without fence.proxy.async");
    CHECK((product_error<bfloat16, 64, false, kWait>(0) < 0)), fails("before its products were waited for");
    CHECK((product_error<bfloat16, 64, false, kCommit>(0) < 0)), fails("before its products were waited for");
    CHECK((product_error<bfloat16, 64, false, kWarp>(0) < 0)), fails("did not all execute it");
    CHECK(run(no_barrier, 1, 32, 8, o.p)), fails("a barrier that was not initialized");
    CHECK(run(shape_of_others, 1, 128, 64 * 128 + 1024, f.p)), fails("another shape is under way");
    CHECK(run(no_swizzle, 1, 128, 4096, f.p)), fails("only descriptors of 128-byte swizzle");
    CHECK((product_error<bfloat16, 16, true>(4) < 0)), fails("rows that begin within eight");
    CHECK(run_box<kNoFence>(x, out, first)), fails("no fence.proxy.async has made visible");
    CHECK(run_box<kNoBytes>(x, out, first)), fails("32 wait at mbarrier.try_wait (first: 0)");
    CHECK(run_box<kSkewed>(x, out, first)), fails("no multiple of 128");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const std::pair<const char*, std::function<void()>> tests[] = {
      {"products-bfloat16", products_of<bfloat16>},
      {"products-float16", products_of<float16>},
      {"boxes", boxes},
      {"refused-tensors", refused_tensors},
      {"barriers", barriers},
      {"faults", faults},
  };
  for (const auto& [known, test] : tests)
    if (name == known) return test(), failures != 0;
  printf("no test %s\n", name.c_str());
  return 2;
}
