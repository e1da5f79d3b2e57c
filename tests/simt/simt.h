// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ on the CPU: g++ -std=c++20 compiles the device code, and every thread of a block is a fiber in one OS
// thread, so that AddressSanitizer and UBSan check every access of a kernel. Finds wrong results, accesses out of
// bounds or misaligned, and missing barriers; knows nothing of time, of the memory model, or of races that need true
// concurrency. Arithmetic is a little more exact than a GPU's.
//
// Shared memory nobody wrote, undefined shuffles and cp.async targets before their wait hold 0xFF bytes: NaN.
// A fault of the device code ends its launch; cudaGetLastError() then says cudaErrorLaunchFailure, and
// cudaGetErrorString() what happened where. Faults that a sanitizer sees end the process, with block and thread.
// In a shared library compile with -fvisibility=hidden -fno-gnu-unique. The functions simt_* at the end are exported.
#pragma once
#include "fibers.h"
#include "hopper.h"
#include "warp.h"
#pragma GCC visibility push(hidden)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// SHARED(float, s, [4][33]);  SHARED_DYN(float, s);   There is no __shared__: a variable could not be refilled.
#define SHARED(T, name, dims)                          \
  using name##_t = T dims;                             \
  static simt::Static name##_memory(sizeof(name##_t)); \
  name##_t& name = *reinterpret_cast<name##_t*>(name##_memory.p)
#define SHARED_DYN(T, name) T* name = reinterpret_cast<T*>(simt::dyn)

// --- types -----------------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t u;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) : u(simt::to_bfloat16(f)) {}
  operator float() const { return simt::from_bfloat16(u); }
};
struct __half {
  uint16_t u;
  __half() = default;
  __half(float f) : u(simt::to_half(f)) {}
  operator float() const { return simt::from_half(u); }
};
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline float __half2float(__half h) { return h; }

// --- built-in functions ----------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return simt::aligned<T>(p);
}
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __float_as_int(float x) { return int(simt::as_bits(x)); }
inline unsigned __float_as_uint(float x) { return simt::as_bits(x); }
inline float __int_as_float(int x) { return simt::as_float(uint32_t(x)); }
inline float __uint_as_float(unsigned x) { return simt::as_float(x); }
using std::max;
using std::min;

// --- the runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
typedef struct CUstream_st* cudaStream_t;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int numRegs, maxDynamicSharedSizeBytes, ptxVersion, binaryVersion, maxThreadsPerBlock;
};
#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };

namespace simt {

// What the pretended machine is, and what goes wrong on it. Shared memory without asking: 48 KiB; at most 227.
inline int devices = 2, capability = 90, fail_next;
inline int kernel_threads = 1024;  // a block of any kernel may have, by its attributes
inline bool old_driver;            // it knows no tensor maps
inline int64_t launches;
inline thread_local int device;  // these three are a thread's own, as on a GPU
inline thread_local cudaError_t last_error;
inline thread_local std::pair<cudaError_t, std::string> last_text;
inline std::map<std::pair<int, const void*>, int> shared_allowed;  // [device, kernel], as on a GPU
inline std::mutex one_launch;
inline bool behind;      // the next launch need not wait for the one before, each of its threads does that
inline int64_t awaited;  // by how many threads of a launch
constexpr int kSharedDefault = 48 << 10, kSharedMost = 227 << 10;

inline cudaError_t error(cudaError_t code, const std::string& text) {
  last_error = code, last_text = {code, text};
  return code;
}

inline void await_kernel_before() { awaited++; }

// kernel<<<grid, block, shared>>>(args...)
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters");
  const std::lock_guard<std::mutex> lock(one_launch);
  launches++;
  const bool waits = std::exchange(behind, false);
  if (fail_next) {
    error(cudaError_t(fail_next), "made to fail");
    fail_next = 0;
    return;
  }
  const size_t threads = size_t(block.x) * block.y * block.z;
  const auto allowed = shared_allowed.find({device, reinterpret_cast<const void*>(kernel)});
  const size_t limit = allowed == shared_allowed.end() ? kSharedDefault : allowed->second;
  if (threads < 1 || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535)
    return void(error(cudaErrorInvalidConfiguration, "invalid configuration argument"));
  if (shared > limit) return void(error(cudaErrorInvalidValue, "more shared memory than the kernel may have"));
  body = [&] { kernel(P(args)...); };
  awaited = 0;
  try {
    run(grid, block, shared);
    need(!waits || awaited == int64_t(grid.x) * grid.y * grid.z * int64_t(threads),
         "not every thread awaits the kernel before");
  } catch (const std::exception& e) {
    error(cudaErrorLaunchFailure, std::string("simt: ") + e.what());
  }
}

}  // namespace simt

inline cudaError_t cudaGetDeviceCount(int* n) { return *n = simt::devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = simt::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= simt::devices) return simt::error(cudaErrorInvalidDevice, "invalid device ordinal");
  return simt::device = d, cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t e = simt::last_error;
  return simt::last_error = cudaSuccess, e;
}
inline const char* cudaGetErrorString(cudaError_t e) {
  if (e == cudaSuccess) return "no error";
  return e == simt::last_text.first ? simt::last_text.second.c_str() : "another error";
}
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      return *v = 4, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *v = simt::capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *v = simt::capability % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *v = simt::kSharedMost, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute what, int value) {
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > simt::kSharedMost) return simt::error(cudaErrorInvalidValue, "invalid argument");
  simt::shared_allowed[{simt::device, reinterpret_cast<const void*>(kernel)}] = value;
  return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, K*) {
  if (simt::fail_next == cudaErrorNoKernelImageForDevice)
    return simt::error(cudaError_t(std::exchange(simt::fail_next, 0)), "made to fail");
  *a = {0, 32, simt::kSharedDefault, simt::capability, simt::capability, simt::kernel_threads};
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled") && !simt::old_driver;
  *found = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
  return memset(p, value, n), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
#pragma GCC visibility pop

// For a test that has loaded the library.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default"), used)) inline
SIMT_EXPORT void simt_seed(uint64_t seed) { simt::seed = seed; }               // 0: in order
SIMT_EXPORT void simt_copies(int when) { simt::copies = simt::Copies(when); }  // 0 by chance, 1 at the wait, 2 at issue
SIMT_EXPORT void simt_fail_next(int code) { simt::fail_next = code; }          // the next launch fails with this error
SIMT_EXPORT int64_t simt_launches() { return simt::launches; }
SIMT_EXPORT int simt_device() { return simt::device; }
SIMT_EXPORT void simt_capability(int number) { simt::capability = number; }  // of every device, 90 at first
SIMT_EXPORT void simt_kernel_threads(int most) { simt::kernel_threads = most; }
SIMT_EXPORT void simt_old_driver(int old) { simt::old_driver = old; }
