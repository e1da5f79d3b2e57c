// SPDX-License-Identifier: Apache-2.0
// Threads of a block as fibers, one block after the other, and the places where they meet. Part of simt.h.
//
// A fiber runs until it meets others (warp collective, barrier); who runs next is drawn from a seeded generator, so
// that a missing barrier shows as a wrong result. A fault of the device code (deadlock, misaligned access, lanes
// missing from an instruction) ends its launch, which then reports a CUDA error with a text, as a launch on a GPU
// would.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif
#if !defined(__x86_64__)
#error "write simt_switch for this processor, or wrap swapcontext"
#endif
// The layer itself is not under test, and everything that is runs through it.
#define SIMT_HOT __attribute__((no_sanitize("address", "undefined"), optimize("O3")))
// Hidden, so that several libraries of kernels in one process do not share a scheduler.
#pragma GCC visibility push(hidden)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// 0: blocks and threads in order; otherwise every choice is drawn from it
inline uint64_t seed = 1;
// when a cp.async lands: at issue, at its wait, or one of them by chance
enum class Copies { random, deferred, immediate };
inline Copies copies = Copies::random;
constexpr size_t kStackBytes = 256 << 10, kMaxThreads = 1024;

struct Copy {
  void* dst;
  int n;
  alignas(16) char data[16];
};
struct Warp;
struct Fiber {
  void *sp, *fake = nullptr;  // saved stack pointer; the sanitizer's record of this stack
  char* stack;
  uint3 tid;
  unsigned lane;
  Warp* warp;
  bool done;
  const char* waits;  // what it waits for, and its operands there
  unsigned mask;
  const void* in;
  void* out;
  std::vector<Copy> open;  // cp.async not yet committed, committed
  std::vector<std::vector<Copy>> groups;
};
struct Meeting {
  const char* what;
  unsigned mask, arrived;
  void (*op)(Fiber*, unsigned);
};
struct Warp {
  Fiber* lanes;
  unsigned alive;
  int n;
  Meeting meetings[32];
};
struct List {
  int n;
  Fiber* f[kMaxThreads];
  SIMT_HOT void add(Fiber* x) { f[n++] = x; }
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline List ready, barrier;
inline Fiber *cur, host;
inline const void* host_stack;
inline size_t host_stack_bytes;
inline std::function<void()> body;
inline char* dyn;  // dynamic shared memory of the block
inline size_t dyn_bytes;
inline bool greedy, in_kernel;  // greedy: the last released group runs ahead as far as it can
inline unsigned alive;
inline std::string failure;  // of the launch in progress
inline uint64_t rng_state = 1;

SIMT_HOT inline uint64_t rng() {
  rng_state ^= rng_state << 13;
  rng_state ^= rng_state >> 7;
  return rng_state ^= rng_state << 17;
}

inline std::string here() {
  char text[128];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) seed %llu", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z, (unsigned long long)seed);
  return text;
}
inline void report_place() {  // last words after a sanitizer's report
  if (in_kernel) fprintf(stderr, "simt: %s\n", here().c_str());
}
[[noreturn]] inline void fail(const std::string& why) {
  throw std::runtime_error(in_kernel ? why + ", " + here() : why);
}
inline void need(bool ok, const char* why) {
  if (!ok) fail(why);
}

// A static shared array: on the heap, exactly as large as asked, registered on first use, refilled at every block.
struct Static {
  char* p;
  size_t n;
  static std::vector<Static*>& all() {
    static std::vector<Static*> v;
    return v;
  }
  explicit Static(size_t n) : p(static_cast<char*>(aligned_alloc(64, (n + 63) / 64 * 64))), n(n) {
    SIMT_ASAN(free(p); p = static_cast<char*>(malloc(n));)  // so that its end is the end of the block
    memset(p, 0xFF, n);
    all().push_back(this);
  }
  ~Static() { free(p); }
};

// Stacks are made once, reused by every launch, and go with the library. The lowest page of each stays inaccessible.
struct Stacks {
  std::vector<char*> all;
  ~Stacks() {
    for (char* s : all) munmap(s, kStackBytes);
  }
  void reserve(size_t n) {
    while (all.size() < n) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* s = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
      need(s != MAP_FAILED && !mprotect(s, 4096, PROT_NONE), "no memory for stacks");
      all.push_back(static_cast<char*>(s));
    }
  }
};
inline Stacks stacks;

// Switching saves the callee-saved registers on the old stack and takes them from the new one (System V, x86-64).
extern "C" void simt_switch(void** from, void* to);
asm(".pushsection .text\n.weak simt_switch\n.hidden simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.popsection\n");

SIMT_HOT inline void go(Fiber* from, Fiber* to) {
  cur = to;
  threadIdx = to->tid;
  SIMT_ASAN(__sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake, to == &host ? host_stack : to->stack,
                                           to == &host ? host_stack_bytes : kStackBytes);)
  simt_switch(&from->sp, to->sp);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);)
}

[[noreturn]] inline void deadlock() {
  std::map<std::string, std::pair<int, unsigned>> waiting;  // what they wait at: how many, the first of them
  for (size_t i = 0; i < fibers.size(); i++) {
    const Fiber& f = fibers[i];
    if (f.done || !f.waits) continue;
    char mask[16] = "";
    if (f.mask) snprintf(mask, sizeof mask, " %08x", f.mask);
    auto& [n, first] = waiting[f.waits + std::string(mask)];
    if (!n++) first = unsigned(i);
  }
  std::string text = "no thread can go on: ";
  for (const auto& [what, who] : waiting)
    text += std::to_string(who.first) + " wait at " + what + " (first: " + std::to_string(who.second) + "), ";
  text.resize(text.size() - 2);
  fail(text);
}

// What goes on beside the threads, see hopper.h. async_progress() ends one thing that is under way; `must`: nobody can
// go on without.
bool async_progress(bool must);
void async_start();
void async_end();

SIMT_HOT inline Fiber* pick() {  // takes the fiber to run next off the list; the host when all are done
  for (bool more = alive > 0; more;) more = async_progress(!ready.n) && !ready.n;
  if (!ready.n) {
    if (alive) deadlock();
    return &host;
  }
  const int i = seed == 0 ? 0 : greedy ? ready.n - 1 : int(rng() % ready.n);
  Fiber* f = ready.f[i];
  ready.n--;
  if (seed)
    ready.f[i] = ready.f[ready.n];
  else
    memmove(ready.f, ready.f + 1, ready.n * sizeof f);
  return f;
}
SIMT_HOT inline void next() {  // runs another thread; returns when this one is chosen again
  Fiber *me = cur, *f = pick();
  if (f != me) go(me, f);
}
SIMT_HOT inline void release(List& v) {  // makes the waiting threads runnable, in a random order
  for (int i = 0; i < v.n; i++) {
    if (seed) std::swap(v.f[i], v.f[i + int(rng() % (v.n - i))]);
    v.f[i]->waits = nullptr;
    ready.add(v.f[i]);
  }
  v.n = 0;
}
SIMT_HOT inline bool complete(Warp& w, int i) {  // a meeting takes place when all named lanes that still run are there
  const Meeting m = w.meetings[i];
  if (m.arrived != (m.mask & w.alive)) return false;
  w.meetings[i] = w.meetings[--w.n];
  m.op(w.lanes, m.arrived);
  static List v;
  v.n = 0;
  for (int l = 0; l < 32; l++)
    if (m.arrived >> l & 1) v.add(w.lanes + l);
  release(v);
  return true;
}

inline void leave(Fiber* me) {  // nobody waits for a thread that has returned
  Warp& w = *me->warp;
  alive--;
  w.alive &= ~(1u << me->lane);
  for (int i = 0; i < w.n;)
    if (!complete(w, i)) i++;
  if (barrier.n && barrier.n == int(alive)) release(barrier);
}
inline void entry() {
  SIMT_ASAN(const void* b; size_t n; __sanitizer_finish_switch_fiber(nullptr, &b, &n);
            if (!host_stack) host_stack = b, host_stack_bytes = n;)
  Fiber *me = cur, *to = &host;
  try {
    body();
    leave(me);
    to = pick();
  } catch (const std::exception& e) {
    failure = e.what();
  }
  me->done = true;
  go(me, to);
  abort();
}

// All lanes named in mask meet; the last one to arrive runs op(in, out, mask) for the whole warp, then all go on.
template <class Out, class In, class Op>
SIMT_HOT __attribute__((noinline)) Out meet(const char* what, unsigned mask, const In& in, Op) {
  Fiber* me = cur;
  Warp& w = *me->warp;
  Out out;
  need(mask >> me->lane & 1, "a lane is missing from its own mask");
  me->in = &in, me->out = &out, me->waits = what, me->mask = mask;
  void (*const op)(Fiber*, unsigned) = [](Fiber* lanes, unsigned arrived) SIMT_HOT {
    const In* ins[32];
    Out* outs[32];
    for (int l = 0; l < 32; l++)
      ins[l] = static_cast<const In*>(lanes[l].in), outs[l] = static_cast<Out*>(lanes[l].out);
    Op{}(ins, outs, arrived);
  };
  int i = 0;
  while (i < w.n && (w.meetings[i].mask != mask || w.meetings[i].what != what || w.meetings[i].op != op)) i++;
  if (i == w.n) w.meetings[w.n++] = {what, mask, 0, op};
  w.meetings[i].arrived |= 1u << me->lane;
  complete(w, i);
  next();
  return out;
}

inline void start_block(size_t b, const dim3& grid, const dim3& block, size_t shared) {
  const unsigned threads = block.x * block.y * block.z;
  blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
  memset(dyn, 0xFF, shared);  // NaN
  for (Static* s : Static::all()) memset(s->p, 0xFF, s->n);
  for (unsigned i = 0; i < warps.size(); i++) {
    warps[i].lanes = &fibers[32 * i], warps[i].n = 0;
    warps[i].alive = ~0u >> (32 - std::min(32u, threads - 32 * i));
  }
  greedy = rng() & 1, alive = threads, ready.n = barrier.n = 0;
  async_start();
  static List all;
  all.n = 0;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.done = false, f.fake = nullptr, f.waits = nullptr;
    f.stack = stacks.all[i], f.lane = i % 32, f.warp = &warps[i / 32];
    f.tid = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    f.open.clear(), f.groups.clear();
    SIMT_ASAN(__asan_unpoison_memory_region(f.stack + kStackBytes - 8192, 8192);)
    void** s = reinterpret_cast<void**>(f.stack + kStackBytes) - 2;  // `entry` starts as if it had been called
    *s = reinterpret_cast<void*>(entry);
    f.sp = s - 6;
    memset(f.sp, 0, 48);
    all.add(&f);
  }
  release(all);
}

// Runs body() for every thread of a grid. Throws what the device code has done wrong.
inline void run(const dim3& grid, const dim3& block, size_t shared) {
  const unsigned threads = block.x * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  stacks.reserve(threads);
  SIMT_ASAN(static const bool once = (__sanitizer_set_death_callback(report_place), true); (void)once;)
  gridDim = grid, blockDim = block;
  warps.resize((threads + 31) / 32);
  fibers.resize(32 * warps.size());
  for (size_t i = threads; i < fibers.size(); i++) fibers[i].done = true;  // lanes that are not there
  host_stack = nullptr;
  failure.clear();
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  rng_state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (size_t i = blocks; seed && i > 1; i--) std::swap(order[i - 1], order[rng() % i]);
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(malloc(shared)), free);
  dyn = memory.get(), dyn_bytes = shared;
  for (size_t i = 0; i < blocks && failure.empty(); i++) {
    start_block(order[i], grid, block, shared);
    in_kernel = true;
    cur = &host;
    next();
    if (failure.empty()) async_end();
    in_kernel = false;
  }
  if (failure.empty()) return;
  // Threads that did not come to their end leave red zones on their stacks.
  SIMT_ASAN(for (char* s : stacks.all) __asan_unpoison_memory_region(s + 4096, kStackBytes - 4096);)
  throw std::runtime_error(failure);
}

}  // namespace simt
#pragma GCC visibility pop
