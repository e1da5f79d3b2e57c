// SPDX-License-Identifier: Apache-2.0
// The block's fused steps for one instruction set (this file is compiled once per TSK_ISA): residual sum + LayerNorm,
// and bias + GELU, forward and backward.
//
// They are bound by memory: every row is read once and written once, and what needs a second look at it, the mean and
// then the squares around it, works on a copy in the first-level cache. Sums over rows (of dweight and dbias) are
// those of runs of rows, cut by the number of rows alone, and added in order: the bits do not depend on threads.
#include "steps.h"

#include "normal.h"
#include "rows.h"

namespace tsk::TSK_ISA {
namespace {

// The caller's memory, in parts of whole cache lines.
template <class C>
struct Workspace {
  int64_t row;       // elements of a row there
  C *weight, *bias;  // [row], zero behind D
  C* branch_bias;    // likewise
  C* scratch;        // [workers, 2, row]
  C* partial;        // [runs, 2, row]
  int64_t bytes;

  explicit Workspace(const StepJob& job) {
    constexpr int64_t line = 64 / int64_t(sizeof(C));
    row = (job.c->dim + line - 1) / line * line;
    const bool backward = job.step == TSK_ADD_LAYER_NORM_BWD || job.step == TSK_BIAS_GELU_BWD;
    weight = static_cast<C*>(job.c->workspace);
    bias = weight + row;
    branch_bias = bias + row;
    scratch = branch_bias + row;
    partial = scratch + job.workers * 2 * row;
    bytes = (3 + job.workers * 2 + (backward ? job.runs * 2 : 0)) * row * int64_t(sizeof(C));
  }
};

// What every phase of a call needs: T of the rows, U of the branch.
template <class T, class U>
struct Frame {
  typedef Compute<T> C;
  const StepJob& job;
  const TskStepCall& c;
  Workspace<C> w;
  int64_t D;

  explicit Frame(const StepJob& job) : job(job), c(*job.c), w(job), D(job.c->dim) {}

  template <class S>
  const S* row(const TskRows& x, int64_t r) const {
    return static_cast<const S*>(x.data) + r / c.tokens * x.batch + r % c.tokens * x.token;
  }
  C scale(int64_t r) const {
    return c.row_scale ? C(c.row_scale[r / c.tokens * c.scale_batch + r % c.tokens * c.scale_token]) : C(1);
  }
  bool skips(int64_t r) const { return c.skip_cls && r % c.tokens == 0; }
  int64_t first(int64_t n, int64_t worker) const { return n * worker / job.workers; }  // of n things, a worker's
};

// A parameter in the arithmetic type.
template <class T, class C>
void widen(const StepJob& job, const void* from, int32_t dtype, C* to) {
  const bool same = dtype == job.c->dtype;
  over<C>(job.c->dim, [&](int64_t i, auto how) TSK_FLAT {
    how.store(to + i, same ? how.load(static_cast<const T*>(from) + i) : how.load(static_cast<const C*>(from) + i));
  });
}

// --- LayerNorm ------------------------------------------------------------------------------------------------------

// v as it will be read back from storage, which has it already.
template <class T, class How>
TSK_INLINE Vec<Compute<T>> rounded(How how, const T* stored, Vec<Compute<T>> v) {
  return sizeof(T) == 2 ? how.load(stored) : v;
}

// Mean and 1 / deviation of a row. `shift` is what the mean lost to rounding: x - mean - shift is centred. Where the
// mean outweighs the deviation it is not nothing.
template <class C>
struct Statistics {
  C mean, shift, rstd;
};

// x - mean; nothing in the lanes behind a row.
template <class C>
TSK_INLINE Vec<C> centred(Whole, const C* x, C mean) {
  return load(x) - mean;
}
template <class C>
TSK_INLINE Vec<C> centred(Part how, const C* x, C mean) {
  return keep_below<C>(how.load(x) - mean, how.n, C(0));
}

// The same in float64, one element after the other: of rows whose squares overflow float32.
template <class C>
__attribute__((noinline)) Statistics<C> wide_statistics(const C* row, int64_t D, double eps) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < D; ++i) sum += double(row[i]);
  const double mean = sum / double(D);
  for (int64_t i = 0; i < D; ++i) squares += (double(row[i]) - mean) * (double(row[i]) - mean);
  return {C(mean), C(mean - double(C(mean))), C(1.0 / __builtin_sqrt(squares / double(D) + eps))};
}

template <class C>
TSK_INLINE Statistics<C> statistics(const C* row, int64_t D, double total, double eps) {
  const C mean = C(total / double(D));
  const Totals t = sums_over<C>(D, [&](int64_t i, auto how, Sums<C>& s) TSK_FLAT {
    Vec<C> d = centred(how, row + i, mean);
    s.first += d;
    s.second += d * d;
  });
  const double shift = t.first / double(D), variance = t.second / double(D) - shift * shift;
  if (!(variance < __builtin_inf())) return wide_statistics(row, D, eps);
  return {mean, C(shift), C(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

template <class T, class U>
void norm_forward(const StepJob& job, int64_t worker) {
  typedef Compute<T> C;
  const Frame<T, U> f(job);
  const int64_t D = f.D;
  C* row = f.w.scratch + worker * 2 * f.w.row;
  const C *weight = f.w.weight, *bias = f.w.bias, *branch_bias = f.w.branch_bias;
  for (int64_t r = f.first(job.rows, worker); r < f.first(job.rows, worker + 1); ++r) {
    const T* x = f.template row<T>(f.c.x, r);
    T *sum = static_cast<T*>(f.c.sum) + r * D, *out = static_cast<T*>(f.c.out) + r * D;
    double total;
    if (f.c.branch.data && !f.skips(r)) {
      const U* branch = f.template row<U>(f.c.branch, r);
      const C scale = f.scale(r);
      const auto add = [&](int64_t i, auto how, Sums<C>& s, Vec<C> b) TSK_FLAT {
        Vec<C> v = how.load(x + i) + b * scale;
        how.store(sum + i, v);
        v = rounded(how, sum + i, v);
        how.store(row + i, v);
        s.first += v;
      };
      const auto plain = [&](int64_t i, auto how, Sums<C>& s) TSK_FLAT { add(i, how, s, how.load(branch + i)); };
      const auto biased = [&](int64_t i, auto how, Sums<C>& s)
                              TSK_FLAT { add(i, how, s, how.load(branch + i) + how.load(branch_bias + i)); };
      total = (f.c.branch_bias ? sums_over<C>(D, biased) : sums_over<C>(D, plain)).first;
    } else {
      if (f.c.branch.data && sum != x) memcpy(sum, x, D * sizeof(T));
      total = sums_over<C>(D, [&](int64_t i, auto how, Sums<C>& s) TSK_FLAT {
                const Vec<C> v = how.load(x + i);
                how.store(row + i, v);
                s.first += v;
              }).first;
    }
    const Statistics<C> q = statistics(row, D, total, f.c.eps);
    over<C>(D, [&](int64_t i, auto how) TSK_FLAT {
      const Vec<C> score = (how.load(row + i) - q.mean - q.shift) * q.rstd;
      how.store(out + i, score * how.load(weight + i) + how.load(bias + i));
    });
  }
}

// With s = (x - mean) / deviation and g = dout * weight:  dx = (g - mean(g) - s mean(g s)) / deviation + dsum.
template <class T, class U>
void norm_backward(const StepJob& job, int64_t worker) {
  typedef Compute<T> C;
  const Frame<T, U> f(job);
  const int64_t D = f.D;
  C *row = f.w.scratch + worker * 2 * f.w.row, *grad = row + f.w.row;
  const C* weight = f.w.weight;
  for (int64_t run = f.first(job.runs, worker); run < f.first(job.runs, worker + 1); ++run) {
    C *dweight = f.w.partial + run * 2 * f.w.row, *dbias = dweight + f.w.row;
    memset(dweight, 0, 2 * f.w.row * sizeof(C));
    for (int64_t r = job.rows * run / job.runs; r < job.rows * (run + 1) / job.runs; ++r) {
      const T *x = f.template row<T>(f.c.x, r), *dout = f.template row<T>(f.c.dout, r);
      const T* dsum = f.c.dsum.data ? f.template row<T>(f.c.dsum, r) : nullptr;
      T* dx = static_cast<T*>(f.c.dx) + r * D;
      U* dbranch = f.c.dbranch ? static_cast<U*>(f.c.dbranch) + r * D : nullptr;
      const double total = sums_over<C>(D, [&](int64_t i, auto how, Sums<C>& s) TSK_FLAT {
                             const Vec<C> v = how.load(x + i);
                             how.store(row + i, v);
                             s.first += v;
                           }).first;
      const Statistics<C> q = statistics(row, D, total, f.c.eps);
      const Totals t = sums_over<C>(D, [&](int64_t i, auto how, Sums<C>& s) TSK_FLAT {
        const Vec<C> score = (how.load(row + i) - q.mean - q.shift) * q.rstd, d = how.load(dout + i);
        const Vec<C> g = d * how.load(weight + i);
        how.store(row + i, score);
        how.store(grad + i, g);
        how.store(dweight + i, how.load(dweight + i) + d * score);
        how.store(dbias + i, how.load(dbias + i) + d);
        s.first += g;
        s.second += g * score;
      });
      const C mean = C(t.first / double(D)), along = C(t.second / double(D)), scale = f.scale(r);
      const bool skips = f.skips(r);
      over<C>(D, [&](int64_t i, auto how) TSK_FLAT {
        Vec<C> v = (how.load(grad + i) - mean - how.load(row + i) * along) * q.rstd;
        if (dsum) v += how.load(dsum + i);
        how.store(dx + i, v);
        if (dbranch && !skips) how.store(dbranch + i, v * scale);
      });
      if (dbranch && skips) memset(dbranch, 0, D * sizeof(U));
    }
  }
}

// --- GELU -----------------------------------------------------------------------------------------------------------

template <class T, class U>
void gelu_forward(const StepJob& job, int64_t worker) {
  typedef Compute<T> C;
  const Frame<T, U> f(job);
  const C* bias = f.w.bias;
  for (int64_t r = f.first(job.rows, worker); r < f.first(job.rows, worker + 1); ++r) {
    const T* x = f.template row<T>(f.c.x, r);
    T* out = static_cast<T*>(f.c.out) + r * f.D;
    over<C>(f.D, [&](int64_t i, auto how) TSK_FLAT {
      const Vec<C> u = how.load(x + i) + how.load(bias + i);
      how.store(out + i, u * normal(u).cdf);
    });
  }
}

template <class T, class U>
void gelu_backward(const StepJob& job, int64_t worker) {
  typedef Compute<T> C;
  const Frame<T, U> f(job);
  const C* bias = f.w.bias;
  for (int64_t run = f.first(job.runs, worker); run < f.first(job.runs, worker + 1); ++run) {
    C* dbias = f.w.partial + (run * 2 + 1) * f.w.row;
    memset(dbias, 0, f.w.row * sizeof(C));
    for (int64_t r = job.rows * run / job.runs; r < job.rows * (run + 1) / job.runs; ++r) {
      const T *x = f.template row<T>(f.c.x, r), *dout = f.template row<T>(f.c.dout, r);
      T* dx = static_cast<T*>(f.c.dx) + r * f.D;
      over<C>(f.D, [&](int64_t i, auto how) TSK_FLAT {
        const Vec<C> u = how.load(x + i) + how.load(bias + i);
        const Normal<C> n = normal(u);
        const Vec<C> d = how.load(dout + i) * (n.cdf + u * n.density);
        how.store(dx + i, d);
        how.store(dbias + i, how.load(dbias + i) + d);
      });
    }
  }
}

// --- sums over rows -------------------------------------------------------------------------------------------------

// The first or second sums of all runs, in order, to `to`; a worker has some of the columns.
template <class T, class U>
void add_runs(const StepJob& job, int64_t worker, int64_t which, void* to, int32_t dtype) {
  typedef Compute<T> C;
  const Frame<T, U> f(job);
  constexpr int64_t W = kWidth<C>;
  const int64_t vectors = (f.D + W - 1) / W;
  const int64_t begin = f.first(vectors, worker) * W, end = f.first(vectors, worker + 1) * W;
  const int64_t width = (end < f.D ? end : f.D) - begin;
  const C* partial = f.w.partial + which * f.w.row + begin;
  const bool same = dtype == f.c.dtype;
  over<C>(width, [&](int64_t i, auto how) TSK_FLAT {
    Vec<C> sum{};
    for (int64_t run = 0; run < job.runs; ++run) sum += how.load(partial + run * 2 * f.w.row + i);
    if (same)
      how.store(static_cast<T*>(to) + begin + i, sum);
    else
      how.store(static_cast<C*>(to) + begin + i, sum);
  });
}

template <class T, class U>
void add_all_runs(const StepJob& job, int64_t worker) {
  if (job.step == TSK_ADD_LAYER_NORM_BWD) add_runs<T, U>(job, worker, 0, job.c->dweight, job.c->weight_dtype);
  add_runs<T, U>(job, worker, 1, job.c->dbias, job.c->bias_dtype);
}

// --- the call -------------------------------------------------------------------------------------------------------

// Calls f with null pointers of the types of rows and branch.
template <class F>
void with_dtypes(const StepJob& job, F f) {
  const int32_t rows = job.c->dtype, branch = job.c->branch_dtype;
  if (rows == TSK_F64) return f((double*)nullptr, (double*)nullptr);
  if (rows == TSK_BF16) return f((BFloat16*)nullptr, (BFloat16*)nullptr);
  if (rows == TSK_F16) return f((Half*)nullptr, (Half*)nullptr);
  if (branch == TSK_BF16) return f((float*)nullptr, (BFloat16*)nullptr);
  if (branch == TSK_F16) return f((float*)nullptr, (Half*)nullptr);
  return f((float*)nullptr, (float*)nullptr);
}

template <class T, class U>
void run_as(const StepJob& job, T*, U*) {
  const Workspace<Compute<T>> w(job);
  const TskStepCall& c = *job.c;
  const bool norm = job.step <= TSK_ADD_LAYER_NORM_BWD;
  if (norm) widen<T>(job, c.weight, c.weight_dtype, w.weight);
  if (norm && c.branch_bias) widen<T>(job, c.branch_bias, c.dtype, w.branch_bias);
  if (job.step != TSK_ADD_LAYER_NORM_BWD) widen<T>(job, c.bias, c.bias_dtype, w.bias);
  switch (job.step) {
    case TSK_ADD_LAYER_NORM_FWD:
      return job.parallel(job, norm_forward<T, U>);
    case TSK_BIAS_GELU_FWD:
      return job.parallel(job, gelu_forward<T, T>);
    case TSK_ADD_LAYER_NORM_BWD:
      job.parallel(job, norm_backward<T, U>);
      break;
    default:
      job.parallel(job, gelu_backward<T, T>);
  }
  job.parallel(job, add_all_runs<T, T>);
}

int64_t workspace(const StepJob& job) {
  return job.c->dtype == TSK_F64 ? Workspace<double>(job).bytes : Workspace<float>(job).bytes;
}
void run(const StepJob& job) {
  with_dtypes(job, [&](auto* rows, auto* branch) { run_as(job, rows, branch); });
}

}  // namespace

extern const StepKernels steps;
const StepKernels steps = {workspace, run};

}  // namespace tsk::TSK_ISA
