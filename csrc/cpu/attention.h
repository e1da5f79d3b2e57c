// SPDX-License-Identifier: Apache-2.0
// What the dispatcher and the kernels of each instruction set share. No templates and no inline functions here: this
// header is compiled with every set of flags.
#pragma once
#include "../abi.h"

namespace tsk {

// A call, with what every phase of it needs. Work is cut into `workers` equal runs of items, each with its own scratch;
// no result depends on the cut, so any number of threads gives the same bits.
struct Job {
  const TskAttention* a;
  int64_t G, L;  // groups, patches per group
  bool cls_key;  // the class row is a key of every group
  int64_t workers;
  void (*parallel)(const Job&, void (*body)(const Job&, int64_t worker));
};

struct Kernels {
  const char* name;
  int64_t (*workspace)(const Job&, bool backward);  // bytes
  void (*forward)(const Job&);
  void (*backward)(const Job&);
};

}  // namespace tsk
