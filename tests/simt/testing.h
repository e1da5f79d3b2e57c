// SPDX-License-Identifier: Apache-2.0
// What the tests of simt.h share: checks that are counted, numbers, memory of an exact size, launches.
#pragma once
#include <cstdio>
#include <functional>

#include "../../csrc/cuda/ptx.cuh"

using namespace tsk;

namespace {

int failures = 0;
void check(bool ok, const char* what) {
  if (ok) return;
  failures++;
  printf("wrong: %s\n", what);
}
#define CHECK(x) check((x), #x)

double uniform() {  // in [-1, 1)
  static uint64_t state = 7;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(state >> 11) / double(1ull << 52) - 1;
}

// Exactly n elements on the heap, all bits set: NaN, or -1.
template <class T>
struct Buffer {
  T* p;
  int n;
  explicit Buffer(int n) : p(static_cast<T*>(malloc(n * sizeof(T)))), n(n) {
    memset(static_cast<void*>(p), 0xFF, n * sizeof(T));
  }
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
  T& operator[](int i) { return p[i]; }
};

// LAUNCH, and what came of it
template <class... P, class... A>
cudaError_t run(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared, A... args) {
  LAUNCH(kernel, blocks, threads, shared, cudaStream_t(nullptr), args...);
  return cudaGetLastError();
}
bool said(cudaError_t e, const char* text) { return strstr(cudaGetErrorString(e), text) != nullptr; }

}  // namespace
