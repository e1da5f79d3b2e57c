// SPDX-License-Identifier: Apache-2.0
// The C entry points: checks, the instruction set chosen at run time, threads borrowed from the caller.
#include <stdio.h>
#include <string.h>
#ifdef TSK_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "steps.h"

#define TSK_DECLARE(isa)          \
  namespace tsk::isa {            \
  extern const Kernels kernels;   \
  extern const StepKernels steps; \
  }
#ifdef TSK_HAVE_AMX
namespace tsk::amx {
extern const Kernels kernels;
}
#endif
#ifdef TSK_HAVE_AVX512BF16
TSK_DECLARE(avx512bf16)
#endif
#ifdef TSK_HAVE_AVX512
TSK_DECLARE(avx512)
#endif
#ifdef TSK_HAVE_AVX2
TSK_DECLARE(avx2)
#endif
TSK_DECLARE(baseline)

namespace tsk {
namespace {

thread_local char last_error[256] = "";

template <class... Args>
int32_t fail(int32_t status, const char* format, Args... args) {
  snprintf(last_error, sizeof last_error, format, args...);
  return status;
}

// --- instruction sets -----------------------------------------------------------------------------------------------

#ifdef TSK_HAVE_AMX
// Whether the chip has matrix units for bfloat16 and the kernel lets this process keep their state, which it asks for.
bool has_amx() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;  // of leaf 7
  constexpr long request = 0x1023, tile_data = 18;      // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16) || !(d & tile)) return false;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

constexpr int kMaxIsas = 5;
struct Isas {
  struct Isa {
    const Kernels* attention;
    const StepKernels* steps;
  };
  Isa usable[kMaxIsas];  // best first
  int count = 0;
  char names[64] = "";

  void add(const Kernels& k, const StepKernels& s) {
    usable[count++] = {&k, &s};
    if (names[0]) strcat(names, " ");
    strcat(names, k.name);
  }

  Isas() {
#ifdef TSK_HAVE_AVX2
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifdef TSK_HAVE_AVX512
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef TSK_HAVE_AVX512BF16
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef TSK_HAVE_AMX
    if (bf16 && has_amx()) add(amx::kernels, avx512bf16::steps);
#endif
    if (bf16) add(avx512bf16::kernels, avx512bf16::steps);
#endif
    if (avx512) add(avx512::kernels, avx512::steps);
#endif
    if (avx2) add(avx2::kernels, avx2::steps);
#endif
    add(baseline::kernels, baseline::steps);
  }
};

const Isas& isas() {
  static const Isas all;
  return all;
}
Isas::Isa current = isas().usable[0];

// --- threads --------------------------------------------------------------------------------------------------------

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body, void* context);
ParallelFor parallel_for = nullptr;

template <class J>
struct Phase {
  const J* job;
  void (*body)(const J&, int64_t worker);
};

template <class J>
void run_range(int64_t begin, int64_t end, void* context) {
  const auto* phase = static_cast<const Phase<J>*>(context);
  for (int64_t worker = begin; worker < end; ++worker) phase->body(*phase->job, worker);
}

// Without a thread pool, or where it reports a failure, the workers run one after the other: each writes what only it
// writes, so that doing one again gives the same bits.
template <class J>
void parallel(const J& job, void (*body)(const J&, int64_t)) {
  Phase<J> phase{&job, body};
  if (job.workers == 1 || !parallel_for || parallel_for(0, job.workers, 1, run_range<J>, &phase) != 0)
    run_range<J>(0, job.workers, &phase);
}

// --- checks ---------------------------------------------------------------------------------------------------------

int64_t product(const TskAxis* axes) {
  int64_t n = 1;
  for (int i = 0; i < TSK_MAX_AXES; ++i) n *= axes[i].size;
  return n;
}

int32_t prepare(const TskAttention* a, Job* job) {
  if (a->dtype < TSK_F32 || a->dtype > TSK_F64) return fail(TSK_INVALID, "dtype code %d is unknown", int(a->dtype));
  if (a->cls < TSK_CLS_NONE || a->cls > TSK_CLS_GLOBAL) return fail(TSK_INVALID, "cls code %d is unknown", int(a->cls));
  for (int i = 0; i < TSK_MAX_AXES; ++i)
    if (a->groups[i].size < 0 || a->sequence[i].size < 0) return fail(TSK_INVALID, "a view has a negative size");
  if (a->batch < 0 || a->heads < 0 || a->head_dim < 1 || a->max_threads < 1)
    return fail(TSK_INVALID, "sizes are out of range: batch %lld, heads %lld, head_dim %lld, max_threads %lld",
                (long long)a->batch, (long long)a->heads, (long long)a->head_dim, (long long)a->max_threads);
  job->a = a;
  job->G = product(a->groups);
  job->L = product(a->sequence);
  if (job->G * job->L + (a->cls != TSK_CLS_NONE) != a->tokens)
    return fail(TSK_INVALID, "a view of %lld x %lld patches does not fit %lld tokens", (long long)job->G,
                (long long)job->L, (long long)a->tokens);
  job->cls_key = a->cls >= TSK_CLS_PER_GROUP;
  // Below some 100 microseconds of work a second thread costs more than it brings.
  const double work = double(a->batch) * job->G * a->heads * (job->L + 1) * (job->L + 8) * a->head_dim;
  const int64_t worth = work < 1e6 ? 1 : int64_t(work / 5e5 < 1e6 ? work / 5e5 : 1e6);
  job->workers = worth < a->max_threads ? worth : a->max_threads;
  job->parallel = parallel<Job>;
  return TSK_OK;
}

int32_t run(const TskAttention* a, bool backward) {
  Job job;
  if (int32_t status = prepare(a, &job)) return status;
  if (backward && a->q_bias) return fail(TSK_INVALID, "q_bias is given to a backward, which has no gradient of it");
  if (a->batch == 0 || a->heads == 0 || a->tokens == 0) return TSK_OK;
  (backward ? current.attention->backward : current.attention->forward)(job);
  return TSK_OK;
}

// --- the fused steps ------------------------------------------------------------------------------------------------

// 16-bit rows may come with float32 vectors, and float32 rows with a 16-bit branch.
bool mixes(int32_t narrow, int32_t wide) { return wide == TSK_F32 && (narrow == TSK_BF16 || narrow == TSK_F16); }

int32_t prepare(const TskStepCall* c, int32_t step, StepJob* job) {
  if (step < TSK_ADD_LAYER_NORM_FWD || step > TSK_BIAS_GELU_BWD) return fail(TSK_INVALID, "step %d is unknown", step);
  if (c->dtype < TSK_F32 || c->dtype > TSK_F64) return fail(TSK_INVALID, "dtype code %d is unknown", int(c->dtype));
  if (c->branch_dtype != c->dtype && !mixes(c->branch_dtype, c->dtype))
    return fail(TSK_INVALID, "a branch of dtype code %d beside rows of %d", int(c->branch_dtype), int(c->dtype));
  const int32_t vectors[] = {c->weight_dtype, c->bias_dtype};
  for (const int32_t dtype : vectors)
    if (dtype != c->dtype && !mixes(c->dtype, dtype))
      return fail(TSK_INVALID, "vectors of dtype code %d beside rows of %d", int(dtype), int(c->dtype));
  if (c->batch < 0 || c->tokens < 0 || c->dim < 1 || c->max_threads < 1)
    return fail(TSK_INVALID, "sizes are out of range: batch %lld, tokens %lld, dim %lld, max_threads %lld",
                (long long)c->batch, (long long)c->tokens, (long long)c->dim, (long long)c->max_threads);
  job->c = c;
  job->step = step;
  job->rows = c->batch * c->tokens;
  // Sums over rows are those of runs of rows, by the number of rows alone, added in order.
  const int64_t runs = (job->rows + kRowsOfRun - 1) / kRowsOfRun;
  job->runs = runs < kMaxRuns ? runs : kMaxRuns;
  const double work = double(job->rows) * double(c->dim);
  const int64_t worth = work < 131072 ? 1 : int64_t(work / 65536 < 1e6 ? work / 65536 : 1e6);
  job->workers = worth < c->max_threads ? worth : c->max_threads;
  job->parallel = parallel<StepJob>;
  return TSK_OK;
}

}  // namespace
}  // namespace tsk

TSK_API int32_t tsk_abi_version() { return TSK_ABI_VERSION; }
TSK_API int64_t tsk_attention_size() { return sizeof(TskAttention); }
TSK_API const char* tsk_last_error() { return tsk::last_error; }
TSK_API void tsk_set_parallel_for(void* fn) { tsk::parallel_for = reinterpret_cast<tsk::ParallelFor>(fn); }
TSK_API const char* tsk_isa() { return tsk::current.attention->name; }
TSK_API const char* tsk_isas() { return tsk::isas().names; }

TSK_API int32_t tsk_force_isa(const char* name) {
  for (int i = 0; i < tsk::isas().count; ++i)
    if (strcmp(tsk::isas().usable[i].attention->name, name) == 0) return tsk::current = tsk::isas().usable[i], TSK_OK;
  return tsk::fail(TSK_INVALID, "instruction set %s is not one of: %s", name, tsk::isas().names);
}

TSK_API int64_t tsk_attn_workspace(const TskAttention* a, int32_t backward) {
  tsk::Job job;
  if (int32_t status = tsk::prepare(a, &job)) return status;
  return tsk::current.attention->workspace(job, backward);
}
TSK_API int32_t tsk_attn_fwd(const TskAttention* a) { return tsk::run(a, false); }
TSK_API int32_t tsk_attn_bwd(const TskAttention* a) { return tsk::run(a, true); }

TSK_API int64_t tsk_step_size() { return sizeof(TskStepCall); }
TSK_API int64_t tsk_step_workspace(const TskStepCall* c, int32_t step) {
  tsk::StepJob job;
  if (int32_t status = tsk::prepare(c, step, &job)) return status;
  return tsk::current.steps->workspace(job);
}
TSK_API int32_t tsk_step_run(const TskStepCall* c, int32_t step) {
  tsk::StepJob job;
  if (int32_t status = tsk::prepare(c, step, &job)) return status;
  if (job.rows > 0) tsk::current.steps->run(job);
  return TSK_OK;
}
