// SPDX-License-Identifier: Apache-2.0
// The C entry points: checks, which kernels serve a call, and their launches on the caller's device and stream.
#include "../abi.h"
#include "class_row.cuh"
#include "generic.cuh"
#include "hopper_backward.cuh"
#include "problem.cuh"
#include "resident_backward.cuh"
#include "short.cuh"

namespace tsk {
namespace {

// --- checks ---------------------------------------------------------------------------------------------------------

int64_t product(const TskAxis* axes) {
  int64_t n = 1;
  for (int i = 0; i < TSK_MAX_AXES; ++i) n *= axes[i].size;
  return n;
}

Axes axes_of(const TskAxis* from) {
  Axes to;
  for (int i = 0; i < TSK_MAX_AXES; ++i) {
    if (from[i].size == 1) continue;
    to.size[to.count] = Divisor(uint32_t(from[i].size));
    to.step[to.count++] = int32_t(from[i].step);
  }
  return to;
}

bool fits(int64_t n) { return n == int32_t(n); }

// False where a row is out of reach of 32-bit token strides.
bool take(Tensor* to, const TskTensor& from) {
  *to = {from.data, from.batch, from.head, int32_t(from.token)};
  return fits(from.token);
}

int32_t check_sizes(const TskAttention& a) {
  if (a.dtype < TSK_F32 || a.dtype > TSK_F16) return fail(TSK_INVALID, "no kernel for dtype code %d", int(a.dtype));
  if (a.cls < TSK_CLS_NONE || a.cls > TSK_CLS_GLOBAL) return fail(TSK_INVALID, "cls code %d is unknown", int(a.cls));
  if (a.q_bias) return fail(TSK_INVALID, "q_bias is given, which these kernels do not add");
  if (a.batch < 0 || a.heads < 0 || a.tokens < 0 || !fits(a.batch) || !fits(a.heads) || !fits(a.tokens))
    return fail(TSK_INVALID, "sizes are out of range: batch %lld, tokens %lld, heads %lld", (long long)a.batch,
                (long long)a.tokens, (long long)a.heads);
  if (a.head_dim < 1 || a.head_dim > kGenericMaxHeadDim)
    return fail(TSK_INVALID, "kernels for head_dim of 1 to %d, got %lld", kGenericMaxHeadDim, (long long)a.head_dim);
  for (int i = 0; i < TSK_MAX_AXES; ++i) {
    const TskAxis &g = a.groups[i], &s = a.sequence[i];
    if (g.size < 0 || s.size < 0) return fail(TSK_INVALID, "a view has a negative size");
    if (!fits(g.size) || !fits(s.size) || !fits(g.step) || !fits(s.step))
      return fail(TSK_INVALID, "a view has an axis of 2^31 or more");
  }
  const int64_t G = product(a.groups), L = product(a.sequence);
  if (!fits(G) || !fits(L + 1) || G * L + (a.cls != TSK_CLS_NONE) != a.tokens)
    return fail(TSK_INVALID, "a view of %lld x %lld patches does not fit %lld tokens", (long long)G, (long long)L,
                (long long)a.tokens);
  return TSK_OK;
}

// The call as kernels take it, but for the workspace.
int32_t prepare(const TskAttention& a, bool backward, Problem* p) {
  if (int32_t status = check_sizes(a)) return status;
  *p = {};
  bool reached = take(&p->q, a.q) & take(&p->k, a.k) & take(&p->v, a.v) & take(&p->out, a.out);
  if (backward) reached &= take(&p->dout, a.dout) & take(&p->dq, a.dq) & take(&p->dk, a.dk) & take(&p->dv, a.dv);
  if (!reached) return fail(TSK_INVALID, "tokens are 2^31 elements or more apart in memory");
  p->group = axes_of(a.groups), p->sequence = axes_of(a.sequence);
  p->batch = int32_t(a.batch), p->tokens = int32_t(a.tokens), p->heads = int32_t(a.heads);
  p->head_dim = int32_t(a.head_dim);
  p->groups = int32_t(product(a.groups)), p->length = int32_t(product(a.sequence));
  constexpr Role kRoles[] = {kNoMember, kNoMember, kPerGroup, kKey, kGlobal};
  p->role = kRoles[a.cls], p->first = a.cls != TSK_CLS_NONE, p->dtype = a.dtype;
  if (p->role == kGlobal && int64_t(p->groups) * p->length == 0) p->groups = 1, p->length = 0;  // it attends to itself
  p->members = p->length + (p->role != kNoMember);
  p->scale = float(a.scale), p->cls_weights = a.cls_weights, p->stats = a.stats;
  p->saved = backward && a.stats;
  return TSK_OK;
}

// No tensor element at all.
bool nothing(const Problem& p) { return p.batch == 0 || p.heads == 0 || p.tokens == 0; }
// No sequence with a member: a class row alone, which is zero.
bool no_sequence(const Problem& p) { return p.groups == 0 || p.members == 0; }

// --- regimes --------------------------------------------------------------------------------------------------------

enum Regime { kGeneric, kShort, kResident, kStreaming, kHopper };

// Of any device. What a workspace holds depends on nothing else.
Regime regime_of(const Problem& p) {
  return short_serves(p) ? kShort : resident_serves(p) ? kResident : streaming_serves(p) ? kStreaming : kGeneric;
}

// Longer sequences than this have the backward of Hopper's kernels even where a block could hold them whole.
constexpr int kHopperBackLeast = 128;

// Whether the forward leaves the backward what the kernels of streaming_backward.cuh read, on any device. Where a block
// can hold the sequence whole it needs none of that; Hopper's kernels do.
bool keeps(const Problem& p) {
  if (streaming_shape(p)) return true;
  return p.dtype != TSK_F32 && p.head_dim == 64 && p.members > kHopperBackLeast && holds_sequence(p);
}

// Whether a backward has what was kept.
bool has_kept(const Problem& p) { return keeps(p) && p.saved && p.out.data && rows_aligned(p, p.out); }

// On the current device, of that number. A backward of Hopper's is one of streaming's elsewhere, with its workspace, or
// one of resident's.
Regime regime_on(int32_t device, const Problem& p, HopperPlan* plan) {
  const Regime regime = regime_of(p);
  const bool backward = p.dq.data;
  if (backward && regime != kStreaming && !(regime == kResident && has_kept(p))) return regime;
  return (backward ? plan_hopper_backward(p, device, plan) : plan_hopper(p, device, &plan->queries)) ? kHopper : regime;
}

const char* regime_name(Regime regime) {
  constexpr const char* kNames[] = {"generic", "short", "resident", "streaming", "hopper"};
  return kNames[regime];
}

// Lays the parts of the workspace out from `at`. Returns its size in bytes.
int64_t place_workspace(Problem* p, bool backward, char* at) {
  int64_t bytes = 0;
  const auto part = [&](bool wanted, float** to, int64_t numbers) {
    if (!wanted || numbers == 0) return;
    *to = at ? reinterpret_cast<float*>(at + bytes) : nullptr;
    bytes += (numbers * int64_t(sizeof(float)) + 63) / 64 * 64;
  };
  if (nothing(*p) || no_sequence(*p)) return 0;
  const int64_t shares = int64_t(p->batch) * p->groups * p->heads, rows = shares * p->members;
  const bool outputs = p->role == kPerGroup && keeps(*p);  // the forward's parts, for the backward
  if (backward) {
    const Regime regime = regime_of(*p);
    const bool generic = regime == kGeneric;
    if (p->saved && outputs) p->kept = p->stats + 2 * rows;
    part(p->role != kNoMember, &p->parts, shares * 3 * p->head_dim);
    const bool numbers = regime == kStreaming || (regime == kResident && has_kept(*p));
    part(generic || numbers, &p->delta, generic ? rows : 4 * rows);
    part(generic && !p->saved, &p->stats, rows * 2);
  } else {
    if (p->stats && outputs)
      p->parts = p->stats + 2 * rows;
    else
      part(p->role >= kPerGroup, &p->parts, shares * p->head_dim);
    part(p->role == kGlobal, &p->sums, shares * 2);
  }
  return bytes;
}

template <class T>
int32_t forward(const Problem& p, int32_t device, cudaStream_t stream) {
  if (no_sequence(p)) return class_zero<T>(p, false, stream);
  HopperPlan plan;
  const Regime regime = regime_on(device, p, &plan);
  int32_t status = TSK_OK;
  if (regime == kGeneric) status = generic_forward<T>(p, stream);
  if constexpr (sizeof(T) == 2) {
    if (regime == kHopper) status = hopper_forward<T>(p, plan.queries, stream);
    if (regime == kShort) status = short_forward<T>(p, stream);
    if (regime == kResident) status = resident_forward<T>(p, stream);
    if (regime == kStreaming) status = streaming_forward<T>(p, stream);
  }
  if (status || p.role < kPerGroup) return status;
  return class_forward<T>(p, stream);
}

template <class T>
int32_t backward(const Problem& p, int32_t device, cudaStream_t stream) {
  if (no_sequence(p)) return class_zero<T>(p, true, stream);
  HopperPlan plan;
  const Regime regime = regime_on(device, p, &plan);
  int32_t status = TSK_OK;
  if (regime == kGeneric) status = generic_backward<T>(p, stream);
  if constexpr (sizeof(T) == 2) {
    if (regime == kHopper) status = hopper_backward<T>(p, plan, stream);
    if (regime == kShort) status = short_backward<T>(p, stream);
    if (regime == kResident) status = resident_backward<T>(p, stream);
    if (regime == kStreaming) status = streaming_backward<T>(p, stream);
  }
  if (status || p.role == kNoMember) return status;
  return class_backward<T>(p, stream);
}

// --- the device -----------------------------------------------------------------------------------------------------

int32_t cuda_failure(const char* what, cudaError_t error) {
  return fail(int32_t(error), "%s: %s (CUDA error %d)", what, cudaGetErrorString(error), int(error));
}

// Makes a device current and the one before it again at the end.
class OnDevice {
 public:
  int32_t status = TSK_OK;

  explicit OnDevice(int32_t device) {
    if (cudaError_t error = cudaGetDevice(&before_)) {
      status = cuda_failure("cudaGetDevice", error);
    } else if (before_ != device) {
      cudaError_t error = cudaSetDevice(device);
      if (error)
        status = cuda_failure("cudaSetDevice", error);
      else
        changed_ = true;
    }
    if (status) cudaGetLastError();  // so that the next launch is not blamed for it
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;
  bool changed_ = false;
};

int32_t run(const TskAttention* a, bool back, int32_t device, void* stream_pointer) {
  Problem p;
  if (int32_t status = prepare(*a, back, &p)) return status;
  if (nothing(p)) return TSK_OK;
  if (back && p.role == kGlobal && !no_sequence(p) && !(p.saved && p.out.data))
    return fail(TSK_INVALID, "the backward of mode \"global\" needs the forward's result and statistics");
  if (back && !no_sequence(p) && regime_of(p) == kStreaming && !(p.saved && p.out.data))
    return fail(TSK_INVALID, "the backward of sequences of %d members needs the forward's result and statistics",
                int(p.members));
  const int64_t bytes = place_workspace(&p, back, static_cast<char*>(a->workspace));
  if (bytes && !a->workspace) return fail(TSK_INVALID, "%lld bytes of workspace are missing", (long long)bytes);
  OnDevice guard(device);
  if (guard.status) return guard.status;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (p.dtype) {
    case TSK_F32:
      return back ? backward<float>(p, device, stream) : forward<float>(p, device, stream);
    case TSK_BF16:
      return back ? backward<bfloat16>(p, device, stream) : forward<bfloat16>(p, device, stream);
    default:
      return back ? backward<float16>(p, device, stream) : forward<float16>(p, device, stream);
  }
}

}  // namespace
}  // namespace tsk

TSK_API int32_t tsk_abi_version() { return TSK_ABI_VERSION; }
TSK_API int64_t tsk_attention_size() { return sizeof(TskAttention); }
TSK_API const char* tsk_last_error() { return tsk::last_error; }

TSK_API const char* tsk_cuda_why_not(int32_t device) {
  const tsk::OnDevice guard(device);
  if (guard.status) return tsk::last_error;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, tsk::class_row_zero<float>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  tsk::fail(int32_t(error), "no kernel for device %d of compute capability %d.%d: %s (CUDA error %d)", int(device),
            major, minor, cudaGetErrorString(error), int(error));
  return tsk::last_error;
}

TSK_API const char* tsk_cuda_regime(const TskAttention* a, int32_t backward, int32_t device) {
  tsk::Problem p;
  if (tsk::prepare(*a, backward, &p)) return nullptr;
  const tsk::OnDevice guard(device);
  if (guard.status) return nullptr;
  tsk::HopperPlan plan;
  return tsk::regime_name(tsk::regime_on(device, p, &plan));
}

TSK_API int64_t tsk_cuda_workspace(const TskAttention* a, int32_t backward) {
  tsk::Problem p;
  if (int32_t status = tsk::prepare(*a, backward, &p)) return status;
  return tsk::place_workspace(&p, backward, nullptr);
}

TSK_API int32_t tsk_cuda_fwd(const TskAttention* a, int32_t device, void* stream) {
  return tsk::run(a, false, device, stream);
}
TSK_API int32_t tsk_cuda_bwd(const TskAttention* a, int32_t device, void* stream) {
  return tsk::run(a, true, device, stream);
}
