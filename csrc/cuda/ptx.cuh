// SPDX-License-Identifier: Apache-2.0
// The only place where device code differs between a GPU and the CPU: under nvcc the functions below are inline PTX,
// under a host compiler calls of simt.h, which runs threads as fibers. Kernels include this header, hold no assembly
// themselves, and declare shared memory with SHARED(T, name, [n][m]) or SHARED_DYN(T, name).
//
// Lane 4 g + t of a warp, in the layouts of mma.m16n8k16 (two 16-bit elements to a register, the first in the low
// half):
//   A 16x16: a0 = A[g][2t, 2t+1]  a1 = A[g+8][2t, 2t+1]  a2 = A[g][2t+8, 2t+9]  a3 = A[g+8][2t+8, 2t+9]
//   B 16x8:  b0 = B[2t, 2t+1][g]  b1 = B[2t+8, 2t+9][g]
//   C 16x8:  c0, c1 = C[g][2t, 2t+1]  c2, c3 = C[g+8][2t, 2t+1]
#pragma once
#include <stdint.h>
#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SHARED(T, name, dims) __shared__ T name dims
#define SHARED_DYN(T, name)                                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  (kernel)<<<(blocks), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__)
// A kernel that calls await_kernel_before() may start while the one before it on the stream ends.
#define LAUNCH_BEHIND(kernel, blocks, threads, shared_bytes, stream, ...)                    \
  [&] {                                                                                      \
    cudaLaunchAttribute early{};                                                             \
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;                           \
    early.val.programmaticStreamSerializationAllowed = 1;                                    \
    cudaLaunchConfig_t how{};                                                                \
    how.gridDim = (blocks), how.blockDim = (threads), how.dynamicSmemBytes = (shared_bytes); \
    how.stream = (stream), how.attrs = &early, how.numAttrs = 1;                             \
    return cudaLaunchKernelEx(&how, (kernel), __VA_ARGS__);                                  \
  }()
#else
#include "simt.h"
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch((kernel), (blocks), (threads), (shared_bytes), __VA_ARGS__))
#define LAUNCH_BEHIND(...) (simt::behind = true, LAUNCH(__VA_ARGS__))
#endif
#define DEVICE __device__ __forceinline__

namespace tsk {

typedef __nv_bfloat16 bfloat16;
typedef __half float16;
template <class T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<float16> = true;

// c += A(16x16) B(16x8), operands of type T (bfloat16 or float16), float32 accumulators
template <class T>
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (kIsHalf<T>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const auto x = simt::mma<kIsHalf<T>>({{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}});
  for (int i = 0; i < 4; i++) c[i] = x.d[i];
#endif
}

// c += A(16x8) B(8x8): the first half of the operands above
template <class T>
DEVICE void mma8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
#ifdef __CUDACC__
  if constexpr (kIsHalf<T>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
#else
  mma<T>(c, a0, a1, 0, 0, b0, 0);
#endif
}

// The transpose of one 8x8 block of 16-bit elements that the warp holds: lane 4 g + t has elements 2t, 2t+1 of row g.
DEVICE uint32_t transposed(uint32_t x) {
#ifdef __CUDACC__
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
#else
  return simt::movmatrix_trans(x);
#endif
}

// N (1, 2, 4) 8x8 matrices of 16-bit elements from shared memory; lane 8 i + r points to row r of matrix i.
template <int N, bool TRANS = false>
DEVICE void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t p = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (N == 1 && !TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0},[%1];" : "=r"(r[0]) : "r"(p) : "memory");
  if constexpr (N == 1 && TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0},[%1];" : "=r"(r[0]) : "r"(p) : "memory");
  if constexpr (N == 2 && !TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(p) : "memory");
  if constexpr (N == 2 && TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(p)
                 : "memory");
  if constexpr (N == 4 && !TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
  if constexpr (N == 4 && TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
#else
  const auto x = simt::ldmatrix<N, TRANS>(row);
  for (int i = 0; i < N; i++) r[i] = x.r[i];
#endif
}

// 16 bytes from global to shared memory without a register; of these the bytes from n on become zero
DEVICE void cp_async16(void* dst, const void* src, int n = 16) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(uint32_t(__cvta_generic_to_shared(dst))), "l"(src),
               "r"(n)
               : "memory");
#else
  simt::cp_async<16>(dst, src, n);
#endif
}
DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}
// Until at most LEFT of this thread's groups are under way. Other threads' copies: a barrier after it.
template <int LEFT>
DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
  simt::cp_async_wait(LEFT);
#endif
}

// The kernel behind this one on its stream may be brought in, up to where it waits for this one's end.
DEVICE void admit_kernel_behind() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before has ended and what it wrote can be seen: every block of a kernel launched by LAUNCH_BEHIND.
DEVICE void await_kernel_before() {
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  simt::await_kernel_before();
#endif
}

// 16 aligned bytes that nobody writes during the kernel
DEVICE uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
// Written as one instruction: the compiler may take an assignment of a uint4 apart.
DEVICE void store16(void* p, uint4 x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#else
  simt::aligned<uint4>(p) = x;
#endif
}

// Two floats rounded to the nearest even T, `low` in the low half
template <class T>
DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  uint32_t r;
  if constexpr (kIsHalf<T>)
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return T(low).u | uint32_t(T(high).u) << 16;
#endif
}
// The two elements of a register as floats
template <class T>
DEVICE float2 unpack(uint32_t x) {
#ifdef __CUDACC__
  if constexpr (kIsHalf<T>)
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  else
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u));
#else
  T low, high;
  low.u = uint16_t(x), high.u = uint16_t(x >> 16);
  return {float(low), float(high)};
#endif
}

// Collects in `seen` (0 at first) whether any element of many registers was not finite: see all_finite().
template <class T>
DEVICE uint32_t note_finite(uint32_t seen, uint32_t x) {
#ifdef __CUDACC__  // + 0 * x, which is NaN where x is not finite
  const uint32_t zero = 0;
  if constexpr (kIsHalf<T>)
    asm("fma.rn.f16x2 %0,%1,%2,%0;" : "+r"(seen) : "r"(x), "r"(zero));
  else
    asm("fma.rn.bf16x2 %0,%1,%2,%0;" : "+r"(seen) : "r"(x), "r"(zero));
  return seen;
#else
  const float2 y = unpack<T>(x), z = unpack<T>(seen);
  return pack<T>(z.x + 0.0f * y.x, z.y + 0.0f * y.y);
#endif
}
// Whether all that a warp has noted was finite
DEVICE bool all_finite(uint32_t seen) { return __all_sync(~0u, (seen & 0x7FFF7FFFu) == 0); }

// 2^x; a GPU's result is within 2 ulp, and zero where it would be subnormal
DEVICE float ex2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}
// 1/x within 1 ulp
DEVICE float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
// a * b, rounded: never a part of a fused multiply-add
DEVICE float times(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  float product = a * b;
  asm("" : "+x"(product));
  return product;
#endif
}

// --- compute capability 9.0 ------------------------------------------------------------------------------------------
//
// Barriers in shared memory that count bytes as well, copies by the tensor memory accelerator, products of four warps.
// Both see shared memory as panels: rows of 128 bytes at a multiple of 1024, chunk c of row r in place c ^ (r % 8).

DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return uint32_t(__cvta_generic_to_shared(p));
#else
  return simt::shared_address(p);
#endif
}

// A barrier's phase ends when so many have arrived and all bytes it expects have come.
DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  simt::barrier_init(barrier, arrivals);
#endif
}
// What this thread has written to shared memory, barriers too, is seen by copies and products from now on.
DEVICE void fence_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  simt::fence_async();
#endif
}
DEVICE void barrier_arrive(uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  simt::barrier_arrive(barrier, 0);
#endif
}
// Arrives and has the phase wait for so many bytes more
DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  simt::barrier_arrive(barrier, bytes);
#endif
}
// Until the phase of that parity has ended; the first has parity 0.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef __CUDACC__
  uint32_t ended;
  do {
    asm volatile("{.reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended,[%1],%2; selp.u32 %0,1,0,ended;}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!ended);
#else
  simt::barrier_wait(barrier, parity);
#endif
}

// A box of a five-dimensional tensor to shared memory, zeros for what lies outside; its bytes come to the barrier.
DEVICE void copy_box(void* to, const CUtensorMap& map, uint64_t* barrier, const int (&at)[5]) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%3,%4,%5,%6,%7}],[%2];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
#else
  simt::copy_box(to, map, barrier, at);
#endif
}

// 16 columns of a panel from `column` on, or 16 of its rows from `row` on, multiples of 8, as a product's right
// operand. Eight rows are 1024 bytes from the next eight; the other offset is for operands wider than a panel.
DEVICE uint64_t panel_operand(const void* panel, int row, int column) {
  const uint32_t first = shared_address(panel) >> 4 & 0x3FFF, low = (first | 1 << 16) + (128 * row + 2 * column) / 16;
  return uint64_t(1 << 30 | 1024 >> 4) << 32 | low;
}

// Registers that ordinary instructions have written may be used by the products that follow.
DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence();
#endif
}
DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit();
#endif
}
// Until at most LEFT committed groups of products are under way; before that their sums must not be touched.
template <int LEFT>
DEVICE void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#else
  simt::wgmma_wait(LEFT);
#endif
}

// d = A(64x16) B(16xN), or d += with `add`, by four warps, each of which holds its 16 rows of A as for mma() and of d
// as N / 8 of its C. B is a panel_operand(): of N rows and 16 columns, whose transpose it is, or, ROWS, of 16 rows and
// N columns. Starts the product: wgmma_commit() and wgmma_wait() end it.
template <class T, int N, bool ROWS>
DEVICE void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 16 || N == 32 || N == 48 || N == 64, "a product has 16, 32, 48 or 64 columns");
#ifdef __CUDACC__
#define TSK_SUMS(i)                                                                                                    \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), \
      "+f"(d[i + 1][3])
#define TSK_WGMMA(n, type, sums, rest, add_at, ...)                                                                 \
  asm volatile("{.reg .pred add; setp.ne.b32 add," add_at ",0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" sums "}," rest ";}"                                                                    \
               : __VA_ARGS__                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(ROWS)))
#define TSK_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define TSK_16 TSK_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TSK_24 TSK_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define TSK_32 TSK_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define TSK_WGMMAS(type)                                                                                              \
  if constexpr (N == 16) TSK_WGMMA("16", type, TSK_8, "{%8,%9,%10,%11},%12,add,1,1,%14", "%13", TSK_SUMS(0));         \
  if constexpr (N == 32)                                                                                              \
    TSK_WGMMA("32", type, TSK_16, "{%16,%17,%18,%19},%20,add,1,1,%22", "%21", TSK_SUMS(0), TSK_SUMS(2));              \
  if constexpr (N == 48)                                                                                              \
    TSK_WGMMA("48", type, TSK_24, "{%24,%25,%26,%27},%28,add,1,1,%30", "%29", TSK_SUMS(0), TSK_SUMS(2), TSK_SUMS(4)); \
  if constexpr (N == 64)                                                                                              \
  TSK_WGMMA("64", type, TSK_32, "{%32,%33,%34,%35},%36,add,1,1,%38", "%37", TSK_SUMS(0), TSK_SUMS(2), TSK_SUMS(4),    \
            TSK_SUMS(6))
  if constexpr (kIsHalf<T>) {
    TSK_WGMMAS("f16");
  } else {
    TSK_WGMMAS("bf16");
  }
#undef TSK_SUMS
#undef TSK_WGMMA
#undef TSK_WGMMAS
#undef TSK_8
#undef TSK_16
#undef TSK_24
#undef TSK_32
#else
  simt::wgmma<kIsHalf<T>, N, ROWS>(d, a, b, add);
#endif
}

}  // namespace tsk
