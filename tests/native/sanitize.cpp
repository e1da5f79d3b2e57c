// SPDX-License-Identifier: Apache-2.0
// Runs the exported C functions under AddressSanitizer and UBSan. Every tensor is a heap block of exactly its size, so
// a load or store one element outside is an error. Built and fed by tests/test_memory_safety.py; one case per input
// line:
//     attention dtype cls weights q_bias batch tokens heads head_dim  (size step) x 3 groups  (size step) x 3 sequence
//     steps dtype branch_dtype vector_dtype batch tokens dim skip_cls scaled_and_biased
// Exit code 0 when every result is finite; a sanitizer ends the process with its own report.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/abi.h"

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<void, Free>;

int64_t item_size(int32_t dtype) { return dtype == TSK_F64 ? 8 : dtype == TSK_F32 ? 4 : 2; }

uint32_t next_random() {
  static uint32_t state = 12345;
  return state = state * 1664525u + 1013904223u;
}

// Exactly n elements; random values in +-2, or NaN where the kernel has to write.
Block make(int32_t dtype, int64_t n, bool random) {
  char* p = static_cast<char*>(std::malloc(n * item_size(dtype) + (n == 0)));
  std::memset(p, 0xFF, n * item_size(dtype));
  for (int64_t i = 0; random && i < n; ++i) {
    const float x = float(next_random() >> 8) / float(1 << 23) * 2.0f - 2.0f;
    const double wide = x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t brain = uint16_t(bits >> 16);
    // fp16 of random sign and mantissa, exponent 2^-4 .. 2^-1
    const uint16_t half = uint16_t((next_random() >> 16 & 0x83FF) | (11 + (next_random() >> 24) % 4) << 10);
    if (dtype == TSK_F64) std::memcpy(p + 8 * i, &wide, 8);
    if (dtype == TSK_F32) std::memcpy(p + 4 * i, &x, 4);
    if (dtype == TSK_BF16) std::memcpy(p + 2 * i, &brain, 2);
    if (dtype == TSK_F16) std::memcpy(p + 2 * i, &half, 2);
  }
  return Block(p);
}

bool finite(int32_t dtype, const Block& block, int64_t n) {
  const char* p = static_cast<const char*>(block.get());
  for (int64_t i = 0; i < n; ++i) {
    double wide;
    float x;
    uint16_t bits;
    if (dtype == TSK_F64) {
      std::memcpy(&wide, p + 8 * i, 8);
      if (!std::isfinite(wide)) return false;
    } else if (dtype == TSK_F32) {
      std::memcpy(&x, p + 4 * i, 4);
      if (!std::isfinite(x)) return false;
    } else {
      std::memcpy(&bits, p + 2 * i, 2);
      const uint16_t exponent = dtype == TSK_BF16 ? 0x7F80 : 0x7C00;
      if ((bits & exponent) == exponent) return false;
    }
  }
  return true;
}

int run_attention(std::istringstream& in) {
  TskAttention a = {};
  int weights, biased;
  in >> a.dtype >> a.cls >> weights >> biased >> a.batch >> a.tokens >> a.heads >> a.head_dim;
  int64_t groups = 1;
  for (auto* axes : {a.groups, a.sequence})
    for (int i = 0; i < TSK_MAX_AXES; ++i) in >> axes[i].size >> axes[i].step;
  for (const TskAxis& axis : a.groups) groups *= axis.size;
  a.scale = 1.0 / std::sqrt(double(a.head_dim));
  a.max_threads = 1;

  const int64_t row = a.heads * a.head_dim, n = a.batch * a.tokens * row;
  // q, k, v lie packed in one block as a model's projection leaves them: the last row of v ends with the block.
  Block packed = make(a.dtype, 3 * n, true), dout = make(a.dtype, n, true);
  Block results[] = {make(a.dtype, n, false), make(a.dtype, n, false), make(a.dtype, n, false),
                     make(a.dtype, n, false)};
  TskTensor* inputs[] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i)
    *inputs[i] = {static_cast<char*>(packed.get()) + i * row * item_size(a.dtype), a.tokens * 3 * row, 3 * row,
                  a.head_dim};
  a.dout = {dout.get(), a.tokens * row, row, a.head_dim};
  TskTensor* outputs[] = {&a.out, &a.dq, &a.dk, &a.dv};
  for (int i = 0; i < 4; ++i) *outputs[i] = {results[i].get(), a.tokens * row, row, a.head_dim};
  Block class_weights = make(TSK_F32, a.batch * groups, true);
  if (weights) a.cls_weights = static_cast<const float*>(class_weights.get());

  Block q_bias = make(a.dtype, row, true);

  for (int backward = 0; backward < 2; ++backward) {
    a.q_bias = biased && !backward ? q_bias.get() : nullptr;
    const int64_t bytes = tsk_attn_workspace(&a, backward);
    if (bytes < 0) return std::fprintf(stderr, "workspace: %s\n", tsk_last_error()), 1;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes + (bytes == 0))) return 1;
    Block workspace(memory);
    std::memset(memory, 0xFF, bytes);
    a.workspace = memory;
    const int32_t status = backward ? tsk_attn_bwd(&a) : tsk_attn_fwd(&a);
    if (status != TSK_OK) return std::fprintf(stderr, "status %d: %s\n", status, tsk_last_error()), 1;
  }
  for (const Block& result : results)
    if (!finite(a.dtype, result, n)) return std::fprintf(stderr, "a result is not finite\n"), 1;
  return 0;
}

// All four steps: the backwards read what the forwards wrote.
int run_steps(std::istringstream& in) {
  TskStepCall c = {};
  int32_t vectors;
  int scaled;
  in >> c.dtype >> c.branch_dtype >> vectors >> c.batch >> c.tokens >> c.dim >> c.skip_cls >> scaled;
  c.weight_dtype = c.bias_dtype = vectors;
  c.eps = 1e-6;
  c.max_threads = 1;
  const int64_t rows = c.batch * c.tokens, n = rows * c.dim;
  // Operands with a gap behind each row but the last, which ends with the block.
  const int64_t step = c.dim + 3, wide = rows * step - 3;
  Block x = make(c.dtype, wide, true), branch = make(c.branch_dtype, wide, true), dout = make(c.dtype, wide, true);
  Block weight = make(vectors, c.dim, true), bias = make(vectors, c.dim, true), scale = make(TSK_F32, rows, true);
  Block branch_bias = make(c.dtype, c.dim, true);
  Block results[] = {make(c.dtype, n, false), make(c.dtype, n, false), make(c.dtype, n, false),
                     make(c.dtype, n, false)};
  Block dbranch = make(c.branch_dtype, n, false);
  Block sums[] = {make(vectors, c.dim, false), make(vectors, c.dim, false)};
  for (int32_t s = TSK_ADD_LAYER_NORM_FWD; s <= TSK_BIAS_GELU_BWD; ++s) {
    c.x = {x.get(), c.tokens * step, step};
    c.branch = {branch.get(), c.tokens * step, step};
    c.dout = c.dsum = {dout.get(), c.tokens * step, step};
    c.weight = weight.get();
    c.bias = bias.get();
    if (scaled) c.row_scale = static_cast<const float*>(scale.get()), c.branch_bias = branch_bias.get();
    c.scale_batch = c.tokens;
    c.scale_token = 1;
    c.sum = results[0].get();
    c.out = results[1 + (s == TSK_BIAS_GELU_FWD)].get();
    c.dx = results[3].get();
    c.dbranch = dbranch.get();
    c.dweight = sums[0].get();
    c.dbias = sums[1].get();
    const int64_t bytes = tsk_step_workspace(&c, s);
    if (bytes < 0) return std::fprintf(stderr, "workspace: %s\n", tsk_last_error()), 1;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) return 1;
    Block workspace(memory);
    std::memset(memory, 0xFF, bytes);
    c.workspace = memory;
    if (tsk_step_run(&c, s) != TSK_OK) return std::fprintf(stderr, "step %d: %s\n", s, tsk_last_error()), 1;
  }
  bool good = finite(c.branch_dtype, dbranch, n);
  for (const Block& result : results) good = good && finite(c.dtype, result, n);
  for (const Block& sum : sums) good = good && finite(vectors, sum, c.dim);
  return good ? 0 : (std::fprintf(stderr, "a result is not finite\n"), 1);
}

int run(const std::string& line) {
  std::istringstream in(line);
  std::string what;
  in >> what;
  return what == "steps" ? run_steps(in) : run_attention(in);
}

}  // namespace

int main() {
  std::vector<std::string> cases;
  for (std::string line; std::getline(std::cin, line);) cases.push_back(line);
  std::istringstream isas(tsk_isas());
  int runs = 0;
  for (std::string isa; isas >> isa;) {
    if (tsk_force_isa(isa.c_str()) != TSK_OK) return std::fprintf(stderr, "cannot force %s\n", isa.c_str()), 1;
    for (const std::string& line : cases) {
      if (run(line)) return std::fprintf(stderr, "failed on %s: %s\n", isa.c_str(), line.c_str()), 1;
      ++runs;
    }
  }
  std::printf("%d runs\n", runs);
}
