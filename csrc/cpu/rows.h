// SPDX-License-Identifier: Apache-2.0
// Walks along a row of any width: whole vectors, then what is left of one.
#pragma once
#include "simd.h"

#define TSK_FLAT __attribute__((always_inline))  // of a lambda: one call per vector would cost more than its work

namespace tsk::TSK_ISA {

// How one step of a walk reads and writes memory: a whole vector, or its first n lanes (zero behind them).
struct Whole {
  template <class T>
  TSK_INLINE Vec<Compute<T>> load(const T* p) const {
    return load_as(p);
  }
  template <class T>
  TSK_INLINE void store(T* p, Vec<Compute<T>> v) const {
    store_as(p, v);
  }
};
struct Part {
  int64_t n;
  template <class T>
  TSK_INLINE Vec<Compute<T>> load(const T* p) const {
    T lanes[kWidth<Compute<T>>];
    memset(lanes, 0, sizeof lanes);
    memcpy(lanes, p, n * sizeof(T));
    return load_as<T>(lanes);
  }
  template <class T>
  TSK_INLINE void store(T* p, Vec<Compute<T>> v) const {
    T lanes[kWidth<Compute<T>>];
    store_as<T>(lanes, v);
    memcpy(p, lanes, n * sizeof(T));
  }
};

// f(i, how) for each vector from element i on.
template <class C, class F>
TSK_INLINE void over(int64_t D, F f) {
  int64_t i = 0;
  for (; i + kWidth<C> <= D; i += kWidth<C>) f(i, Whole{});
  if (i < D) f(i, Part{D - i});
}

// Two sums over a row, which f(i, how, sums) adds to. Four sets in turn: additions need not wait for one another, and
// each lane adds up a quarter of the elements, which also rounds less.
template <class C>
struct Sums {
  Vec<C> first, second;
};
struct Totals {
  double first, second;
};
template <class C, class F>
TSK_INLINE Totals sums_over(int64_t D, F f) {
  constexpr int W = kWidth<C>;
  Sums<C> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    f(i, Whole{}, s[0]);
    f(i + W, Whole{}, s[1]);
    f(i + 2 * W, Whole{}, s[2]);
    f(i + 3 * W, Whole{}, s[3]);
  }
  for (; i + W <= D; i += W) f(i, Whole{}, s[0]);
  if (i < D) f(i, Part{D - i}, s[1]);
  return {hsum<C>((s[0].first + s[1].first) + (s[2].first + s[3].first)),
          hsum<C>((s[0].second + s[1].second) + (s[2].second + s[3].second))};
}

}  // namespace tsk::TSK_ISA
