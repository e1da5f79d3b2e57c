// SPDX-License-Identifier: Apache-2.0
// Attention over a view, forward and backward, for one instruction set (this file is compiled once per TSK_ISA).
//
// The work item is one sequence of one head. Its keys and values are packed into cache once (16-bit types become float
// there), then its queries pass in blocks of kQueryRows: scores of a whole row, softmax, product with the values. Whole
// rows fit the cache, so there is no online softmax, no log-sum-exp to save, and the backward recomputes everything
// from q, k and v (paper, equations 5 to 7 and their derivatives):
//
//     P = softmax(scale Q K^T)    O = P V      dV = P^T dO    dP = dO V^T    dS = P (dP - sum(P dP))
//     dQ = scale dS K             dK = scale dS^T Q
//
// The class row belongs to many groups. Each group writes its share to the workspace and a last phase adds the shares
// in group order, so that results do not depend on threads.
#include "backward.h"
#include "tile_attention.h"

#if defined(__AMX_BF16__)
namespace tsk::avx512bf16 {
extern const Kernels kernels;
}
#endif

#define TSK_STRING_(x) #x
#define TSK_STRING(x) TSK_STRING_(x)

namespace tsk::TSK_ISA {
namespace {

template <class T>
int64_t bytes(const Job& job, bool backward, T*) {
  return Call<T>(job, backward).bytes;
}

#if defined(__AMX_BF16__)
// Matrix units multiply bfloat16; all else runs as on the same chip without them.
int64_t workspace(const Job& job, bool backward) {
  if (job.a->dtype != TSK_BF16) return avx512bf16::kernels.workspace(job, backward);
  return bytes(job, backward, (BFloat16*)nullptr);
}

void run_forward(const Job& job) {
  job.a->dtype == TSK_BF16 ? forward<BFloat16>(job, tile_forward) : avx512bf16::kernels.forward(job);
}
void run_backward(const Job& job) {
  job.a->dtype == TSK_BF16 ? backward<BFloat16>(job, tile_backward) : avx512bf16::kernels.backward(job);
}
#else
// Calls f with a null pointer of the job's storage type.
template <class F>
void with_dtype(const Job& job, F f) {
  switch (job.a->dtype) {
    case TSK_F32:
      return f((float*)nullptr);
    case TSK_BF16:
      return f((BFloat16*)nullptr);
    case TSK_F16:
      return f((Half*)nullptr);
    default:
      return f((double*)nullptr);
  }
}

int64_t workspace(const Job& job, bool backward) {
  int64_t n = 0;
  with_dtype(job, [&](auto* type) { n = bytes(job, backward, type); });
  return n;
}

template <class T>
void run(const Job& job, bool backward_pass, T*) {
  backward_pass ? backward<T>(job) : forward<T>(job);
}

void run_forward(const Job& job) {
  with_dtype(job, [&](auto* type) { run(job, false, type); });
}
void run_backward(const Job& job) {
  with_dtype(job, [&](auto* type) { run(job, true, type); });
}
#endif

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {TSK_STRING(TSK_ISA), workspace, run_forward, run_backward};

}  // namespace tsk::TSK_ISA
