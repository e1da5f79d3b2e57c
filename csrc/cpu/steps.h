// SPDX-License-Identifier: Apache-2.0
// What the dispatcher and the fused steps of each instruction set share. No templates and no inline functions here:
// this header is compiled with every set of flags.
#pragma once
#include "../abi.h"

namespace tsk {

constexpr int64_t kRowsOfRun = 32;  // sums over rows: fewest rows of a partial sum, and most partial sums
constexpr int64_t kMaxRuns = 256;

// A call. Work is cut into `workers` equal parts, of rows or of runs of rows; no result depends on the cut.
struct StepJob {
  const TskStepCall* c;
  int32_t step;
  int64_t rows, runs;
  int64_t workers;
  void (*parallel)(const StepJob&, void (*body)(const StepJob&, int64_t worker));
};

struct StepKernels {
  int64_t (*workspace)(const StepJob&);  // bytes
  void (*run)(const StepJob&);
};

}  // namespace tsk
