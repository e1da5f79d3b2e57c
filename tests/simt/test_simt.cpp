// SPDX-License-Identifier: Apache-2.0
// Tests of simt.h: small kernels through ptx.cuh, their results by plain loops. Built and run by tests/test_simt.py:
//     test_simt NAME     runs one test: exit code 0, or 1 and what was wrong; some must end in a sanitizer's report
#include "testing.h"

namespace {

// --- matrix instructions ---------------------------------------------------------------------------------------------

// c(16x8) = a(16x16) b(16x8), every lane gathering its own elements from row-major matrices, as in the table of
// ptx.cuh.
template <class T>
__global__ void mma_by_hand(const T* a, const T* b, float* c) {
  const int g = threadIdx.x >> 2, t = threadIdx.x & 3;
  const auto two = [](T low, T high) { return uint32_t(low.u) | uint32_t(high.u) << 16; };
  const auto A = [&](int i, int k) { return two(a[16 * i + k], a[16 * i + k + 1]); };
  const auto B = [&](int k, int j) { return two(b[8 * k + j], b[8 * (k + 1) + j]); };
  float d[4] = {};
  mma<T>(d, A(g, 2 * t), A(g + 8, 2 * t), A(g, 2 * t + 8), A(g + 8, 2 * t + 8), B(2 * t, g), B(2 * t + 8, g));
  mma<T>(d, A(g, 2 * t), A(g + 8, 2 * t), A(g, 2 * t + 8), A(g + 8, 2 * t + 8), B(2 * t, g), B(2 * t + 8, g));  // adds
  c[8 * g + 2 * t] = d[0], c[8 * g + 2 * t + 1] = d[1];
  c[8 * (g + 8) + 2 * t] = d[2], c[8 * (g + 8) + 2 * t + 1] = d[3];
}

// The same through cp.async, shared memory and ldmatrix; b lies as [k][n] (TRANS) or as [n][k].
template <class T, bool TRANS, bool WAIT>
__global__ void mma_by_ldmatrix(const T* a, const T* b, float* c) {
  SHARED_DYN(T, s);  // a: 16 rows of 24, then b: 16 rows of 8, or 8 rows of 24
  T* sb = s + 16 * 24;
  const int l = threadIdx.x, g = l >> 2, t = l & 3;
  cp_async16(s + l / 2 * 24 + l % 2 * 8, a + l * 8);
  if (l < 16) cp_async16(TRANS ? sb + l * 8 : sb + l / 2 * 24 + l % 2 * 8, b + l * 8);
  cp_async_commit();
  if (WAIT) cp_async_wait<0>();
  __syncwarp();
  uint32_t x[4], y[2];
  float d[4] = {};
  ldmatrix<4>(x, s + l % 16 * 24 + l / 16 * 8);
  ldmatrix<2, TRANS>(y, TRANS ? sb + l % 16 * 8 : sb + l % 8 * 24 + l / 8 % 2 * 8);
  mma<T>(d, x[0], x[1], x[2], x[3], y[0], y[1]);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

enum Way { kByHand, kPlain, kTrans, kNoWait };
template <class T>
double mma_error(Way way) {
  Buffer<T> a(256), b(128);
  Buffer<float> c(128);
  for (int i = 0; i < 256; i++) a[i] = T(float(uniform()));
  for (int i = 0; i < 128; i++) b[i] = T(float(uniform()));
  const size_t shared = 2 * (16 * 24 + (way == kTrans ? 16 * 8 : 7 * 24 + 16));
  const auto kernel = way == kByHand  ? mma_by_hand<T>
                      : way == kPlain ? mma_by_ldmatrix<T, false, true>
                      : way == kTrans ? mma_by_ldmatrix<T, true, true>
                                      : mma_by_ldmatrix<T, false, false>;
  check(run(kernel, 1, 32, way == kByHand ? 0 : shared, (const T*)a.p, (const T*)b.p, c.p) == cudaSuccess, "launch");
  double worst = 0;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      double want = 0;
      for (int k = 0; k < 16; k++) {
        const bool as_nk = way == kPlain || way == kNoWait;
        want += double(float(a[16 * i + k])) * float(as_nk ? b[16 * j + k] : b[8 * k + j]);
      }
      const double error = fabs(want * (way == kByHand ? 2 : 1) - c[8 * i + j]);
      if (!(error <= worst)) worst = error == error ? error : INFINITY;
    }
  return worst;
}
template <class T>
void matrix_products() {
  for (Way way : {kByHand, kPlain, kTrans}) CHECK(mma_error<T>(way) < 1e-5);
}
void missing_wait() {
  simt::copies = simt::Copies::deferred;
  CHECK(!(mma_error<bfloat16>(kNoWait) < 1e-5));
  simt::copies = simt::Copies::immediate;
  CHECK(mma_error<bfloat16>(kNoWait) < 1e-5);
  simt::copies = simt::Copies::deferred;
  CHECK(mma_error<bfloat16>(kPlain) < 1e-5);
}

// out[lane]: the transpose of the 8x8 matrix m; loaded[i][lane]: matrix i of four, plain and transposed
__global__ void matrices(const uint16_t* m, uint32_t* out, uint32_t* loaded) {
  SHARED_DYN(uint16_t, s);
  const int l = threadIdx.x, g = l >> 2, t = l & 3;
  out[l] = transposed(uint32_t(m[8 * g + 2 * t]) | uint32_t(m[8 * g + 2 * t + 1]) << 16);
  for (int i = l; i < 256; i += 32) s[i] = m[i];
  __syncwarp();
  uint32_t plain[4], trans[4], two[2], one[1];
  ldmatrix<4>(plain, s + 8 * l), ldmatrix<4, true>(trans, s + 8 * l);
  ldmatrix<2>(two, s + 8 * l), ldmatrix<1, true>(one, s + 8 * l);
  for (int i = 0; i < 4; i++) loaded[32 * i + l] = plain[i], loaded[32 * (4 + i) + l] = trans[i];
  loaded[32 * 8 + l] = two[1], loaded[32 * 9 + l] = one[0];
}
void layouts() {
  Buffer<uint16_t> m(256);
  Buffer<uint32_t> out(32), loaded(320);
  for (int i = 0; i < 256; i++) m[i] = uint16_t(i * 257);
  CHECK(run(matrices, 1, 32, 512, (const uint16_t*)m.p, out.p, loaded.p) == cudaSuccess);
  const auto at = [&](int i, int r, int c) { return uint32_t(m[64 * i + 8 * r + c]); };
  bool fine = true;
  for (int l = 0; l < 32; l++) {
    const int g = l >> 2, t = l & 3;
    const auto plain = [&](int i) { return at(i, g, 2 * t) | at(i, g, 2 * t + 1) << 16; };
    const auto trans = [&](int i) { return at(i, 2 * t, g) | at(i, 2 * t + 1, g) << 16; };
    fine &= out[l] == trans(0) && loaded[256 + l] == plain(1) && loaded[288 + l] == trans(0);
    for (int i = 0; i < 4; i++) fine &= loaded[32 * i + l] == plain(i) && loaded[32 * (4 + i) + l] == trans(i);
  }
  check(fine, "movmatrix or ldmatrix");
}

// --- collectives -----------------------------------------------------------------------------------------------------

__global__ void collect(int* out) {  // 72 threads: the last warp has 8 lanes
  const int i = threadIdx.x, l = i & 31, n = i < 64 ? 32 : 8;
  const unsigned m = n == 32 ? ~0u : 255u;
  int sum = i;
  for (int d = 1; d < n; d *= 2) {
    const int below = __shfl_up_sync(m, sum, d);
    if (l >= d) sum += below;
  }
  int* o = out + 8 * i;
  o[0] = sum, o[1] = __shfl_xor_sync(m, i, 5), o[2] = __shfl_down_sync(m, i, 3, 8), o[3] = __shfl_sync(m, i, 2, 4);
  o[4] = int(__ballot_sync(m, i & 1)), o[5] = 0;
  if (l & 1) o[5] = int(__ballot_sync(0xAAAAAAAA & m, l > 2));  // lanes of one branch only
  o[6] = __any_sync(m, l == 3), o[7] = __all_sync(m, l < 8);
}
__global__ void leave_early(int* out) {  // exited lanes are not waited for, neither in the warp nor at the barrier
  if (threadIdx.x % 3 == 0) return;
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(~0u, 1));
}
__global__ void from_outside(float* out) {  // from a lane that does not take part
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFF, 1.0f, 20);
}
void collectives() {
  Buffer<int> out(72 * 8), left(64);
  CHECK(run(collect, 1, 72, 0, out.p) == cudaSuccess);
  bool fine = true;
  for (int i = 0; i < 72; i++) {
    const int l = i & 31, base = i - l, n = i < 64 ? 32 : 8, *o = out.p + 8 * i;
    int sum = 0;
    for (int j = base; j <= i; j++) sum += j;
    const unsigned odd = 0xAAAAAAAA & (n == 32 ? ~0u : 255u);
    fine &= o[0] == sum && o[1] == base + (l ^ 5) && o[2] == (l % 8 + 3 < 8 ? i + 3 : i) && o[3] == (i & ~3) + 2;
    fine &= unsigned(o[4]) == odd && unsigned(o[5]) == (l & 1 ? odd & ~2u : 0) && o[6] == 1 && o[7] == (n == 8);
  }
  check(fine, "shuffles and votes");
  CHECK(run(leave_early, 1, 64, 0, left.p) == cudaSuccess);
  for (int i = 0; i < 64; i++) CHECK(left[i] == (i % 3 == 0 ? -1 : 21));
  Buffer<float> undefined(16);
  CHECK(run(from_outside, 1, 32, 0, undefined.p) == cudaSuccess);
  for (int i = 0; i < 16; i++) CHECK(std::isnan(undefined[i]));
}

// --- barriers: without one a result is wrong in almost every order ---------------------------------------------------

template <bool SYNC>
__global__ void reverse(const int* in, int* out) {
  SHARED(int, s, [128]);
  const int i = threadIdx.x;
  s[i] = in[i];
  if (SYNC) __syncthreads();
  out[i] = s[127 - i];
}
template <bool SYNC>
__global__ void rotate(const int* in, int* out) {  // SYNC == false: reads and the next round's writes meet
  SHARED(int, s, [128]);
  const int i = threadIdx.x;
  int v = in[i];
  for (int r = 0; r < 5; r++) {
    s[i] = v;
    __syncthreads();
    v = s[(i + 1) % 128];
    if (SYNC) __syncthreads();
  }
  out[i] = v;
}
template <bool SYNC>
__global__ void warp_reverse(const int* in, int* out) {
  SHARED(int, s, [128]);
  const int i = threadIdx.x;
  s[i] = in[i];
  if (SYNC) __syncwarp();
  out[i] = s[i ^ 31];
}
int wrong_seeds(void (*kernel)(const int*, int*), int (*want)(int)) {
  int wrong = 0;
  for (int seed = 1; seed <= 50; seed++) {
    Buffer<int> in(128), out(128);
    for (int i = 0; i < 128; i++) in[i] = 1000 + i;
    simt::seed = seed;
    CHECK(run(kernel, 1, 128, 0, (const int*)in.p, out.p) == cudaSuccess);
    bool bad = false;
    for (int i = 0; i < 128; i++) bad |= out[i] != 1000 + want(i);
    wrong += bad;
  }
  return wrong;
}
void barriers() {
  const auto reversed = [](int i) { return 127 - i; };
  const auto rotated = [](int i) { return (i + 5) % 128; };
  const auto in_warp = [](int i) { return i ^ 31; };
  CHECK(wrong_seeds(reverse<true>, reversed) == 0);
  CHECK(wrong_seeds(rotate<true>, rotated) == 0);
  CHECK(wrong_seeds(warp_reverse<true>, in_warp) == 0);
  CHECK(wrong_seeds(reverse<false>, reversed) > 45);
  CHECK(wrong_seeds(rotate<false>, rotated) > 45);
  CHECK(wrong_seeds(warp_reverse<false>, in_warp) > 45);
}
__global__ void last_block(int* out) { *out = int(blockIdx.x); }
__global__ void old_shared(float* out) {  // reads what the block before wrote: filled with NaN again
  SHARED(float, s, [32]);
  SHARED_DYN(float, d);
  if (out[threadIdx.x] == 0) out[threadIdx.x] = std::isnan(s[threadIdx.x]) && std::isnan(d[threadIdx.x]) ? 0 : 1;
  s[threadIdx.x] = d[threadIdx.x] = 1;
}
void orders() {
  bool seen[8] = {};
  for (simt::seed = 0; simt::seed < 100; simt::seed++) {
    Buffer<int> out(1);
    CHECK(run(last_block, 8, 32, 0, out.p) == cudaSuccess);
    seen[out[0]] = true;
    if (simt::seed == 0) CHECK(out[0] == 7);
  }
  for (bool s : seen) CHECK(s);
  Buffer<float> out(32);
  for (int i = 0; i < 32; i++) out[i] = 0;
  CHECK(run(old_shared, 5, 32, 128, out.p) == cudaSuccess);
  for (int i = 0; i < 32; i++) CHECK(out[i] == 0);
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// Every finite T between its neighbours: a float a quarter, half and three quarters of the way goes to the nearest
// even.
template <class T>
void conversions_of(uint32_t last) {
  int bad = 0;
  for (uint32_t u = 0; u < last; u++)
    for (uint32_t sign : {0u, 0x8000u}) {
      T x, next;
      x.u = uint16_t(u | sign), next.u = uint16_t((u + 1) | sign);
      const float low = x, high = next;
      bad += T(low).u != x.u;
      if (u + 1 == last) continue;
      bad += T(low + (high - low) * 0.25f).u != x.u;
      bad += T(low + (high - low) * 0.5f).u != (u & 1 ? next.u : x.u);
      bad += T(low + (high - low) * 0.75f).u != next.u;
    }
  CHECK(bad == 0);
  T inf;
  inf.u = uint16_t(last);  // the first pattern that is not finite
  CHECK(std::isinf(float(inf)) && T(INFINITY).u == inf.u && T(3.4028235e38f).u == inf.u && std::isnan(float(T(NAN))));
  CHECK(unpack<T>(pack<T>(1.5f, -2.0f)).x == 1.5f && unpack<T>(pack<T>(1.5f, -2.0f)).y == -2.0f);
}
template <class T>
__global__ void finite_kernel(const uint32_t* x, int* out) {
  const bool fine = all_finite(note_finite<T>(note_finite<T>(0, 0), x[threadIdx.x]));
  out[threadIdx.x] = fine;
}
template <class T>
void finite_of() {
  for (float value : {1.0f, -0.0f, INFINITY, -INFINITY, NAN, 65504.0f}) {
    Buffer<uint32_t> x(32);
    Buffer<int> out(32);
    for (int i = 0; i < 32; i++) x[i] = pack<T>(-2.0f, i == 17 ? value : 3.0f);
    CHECK(run(finite_kernel<T>, 1, 32, 0, (const uint32_t*)x.p, out.p) == cudaSuccess);
    for (int i = 0; i < 32; i++) CHECK(out[i] == std::isfinite(value));
  }
}
void numbers() {
  conversions_of<float16>(0x7C00);
  conversions_of<bfloat16>(0x7F80);
  finite_of<float16>();
  finite_of<bfloat16>();
  CHECK(ex2(-INFINITY) == 0 && ex2(3.0f) == 8 && ex2(-126.5f) == 0 && std::isnan(ex2(NAN)));
}

// --- faults that a launch reports, and after which the next one is right ---------------------------------------------

__global__ void divergent(int* o) {
  if (threadIdx.x)
    o[0] = __shfl_xor_sync(~0u, 1, 1);
  else
    __syncwarp();
}
__global__ void half_barrier(int* o) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncwarp();
  o[0] = 1;
}
__global__ void half_mma(float* o) {
  float d[4] = {};
  if (threadIdx.x < 16) return;
  mma<bfloat16>(d, 0, 0, 0, 0, 0, 0);
  o[0] = d[0];
}
__global__ void skewed_store(float* o) { store16(o + 1, make_uint4(1, 2, 3, 4)); }
__global__ void skewed_load(float* o) { o[0] = float(load16(o + 2).x); }
__global__ void skewed_copy(float* o) {
  SHARED_DYN(float, s);
  cp_async16(s, o + 1);
}
struct Large {
  char bytes[1024];
};
__global__ void take_large(const __grid_constant__ Large x, int* o) { o[threadIdx.x] = x.bytes[1023 - threadIdx.x]; }

void faults() {
  Buffer<int> o(64);
  Buffer<float> f(64);
  const auto works = [&] {
    Large x;
    for (int i = 0; i < 1024; i++) x.bytes[i] = char(i);
    CHECK(run(take_large, 3, 64, 0, x, o.p) == cudaSuccess);
    for (int i = 0; i < 64; i++) CHECK(o[i] == char(1023 - i));
  };
  const auto fails = [&](cudaError_t e, const char* text) {
    CHECK(e == cudaErrorLaunchFailure);
    if (!said(e, text)) check(false, cudaGetErrorString(e));
    CHECK(said(e, "block (") && said(e, "seed"));
    CHECK(cudaGetLastError() == cudaSuccess);  // reported once
    works();
  };
  for (simt::seed = 0; simt::seed < 10; simt::seed++) {
    fails(run(divergent, 2, 32, 0, o.p), "31 wait at __shfl_xor_sync ffffffff (first: 1), 1 wait at __syncwarp");
    fails(run(half_barrier, 2, 64, 0, o.p), "32 wait at __syncthreads (first: 1), 32 wait at __syncwarp");
    fails(run(half_mma, 1, 32, 0, f.p), "mma.sync needs all 32 lanes");
    fails(run(skewed_store, 1, 1, 0, f.p), "misaligned address");
    fails(run(skewed_load, 1, 1, 0, f.p), "misaligned address");
    fails(run(skewed_copy, 1, 1, 16, f.p), "cp.async is misaligned");
  }
}

void runtime() {
  Buffer<float> o(32);
  for (int i = 0; i < 32; i++) o[i] = 0;
  const int64_t before = simt_launches();
  CHECK(run(old_shared, 1, 32, 48 << 10, o.p) == cudaSuccess);
  CHECK(run(old_shared, 1, 32, (48 << 10) + 1, o.p) == cudaErrorInvalidValue);  // not without asking
  CHECK(cudaFuncSetAttribute(old_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10) == cudaSuccess);
  CHECK(run(old_shared, 1, 32, 100 << 10, o.p) == cudaSuccess);
  CHECK(cudaSetDevice(1) == cudaSuccess && simt_device() == 1);
  CHECK(run(old_shared, 1, 32, 100 << 10, o.p) == cudaErrorInvalidValue);  // the attribute is the device's
  CHECK(cudaSetDevice(0) == cudaSuccess && cudaSetDevice(7) == cudaErrorInvalidDevice && simt_device() == 0);
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
  CHECK(cudaFuncSetAttribute(old_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) ==
        cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(run(old_shared, 0, 32, 0, o.p) == cudaErrorInvalidConfiguration);
  CHECK(run(old_shared, 1, 1025, 0, o.p) == cudaErrorInvalidConfiguration);
  simt_fail_next(cudaErrorNoKernelImageForDevice);
  CHECK(run(old_shared, 1, 32, 128, o.p) == cudaErrorNoKernelImageForDevice);
  CHECK(run(old_shared, 1, 32, 128, o.p) == cudaSuccess);
  CHECK(simt_launches() == before + 8);
}

// --- faults that only a sanitizer sees -------------------------------------------------------------------------------

__global__ void over_static(int* o) {
  SHARED(int, s, [4][8]);
  (&s[0][0])[threadIdx.x] = 1;
  __syncthreads();
  *o = s[0][0];
}
__global__ void over_dynamic(int* o) {
  SHARED_DYN(char, s);
  s[threadIdx.x] = 1;
  *o = s[0];
}
__global__ void over_global(int* o) { o[threadIdx.x] = 1; }
[[gnu::noinline]] void write(volatile int* to, int i) { to[i] = 1; }  // UBSan does not know the array's size
__global__ void over_stack(int* o) {
  volatile int a[4] = {};
  write(a, o[0]);
  o[1] = a[0];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  Buffer<int> o(32);
  o[0] = 4;
  const std::pair<const char*, std::function<void()>> tests[] = {
      {"products-bfloat16", matrix_products<bfloat16>},
      {"products-float16", matrix_products<float16>},
      {"missing-wait", missing_wait},
      {"layouts", layouts},
      {"collectives", collectives},
      {"barriers", barriers},
      {"orders", orders},
      {"numbers", numbers},
      {"faults", faults},
      {"runtime", runtime},
      {"over-static", [&] { run(over_static, 1, 33, 0, o.p); }},
      {"over-dynamic", [&] { run(over_dynamic, 1, 32, 31, o.p); }},
      {"over-global", [&] { run(over_global, 1, 33, 0, o.p); }},
      {"over-stack", [&] { run(over_stack, 1, 1, 0, o.p); }},
  };
  for (const auto& [known, test] : tests)
    if (name == known) return test(), failures != 0;
  printf("no test %s\n", name.c_str());
  return 2;
}
