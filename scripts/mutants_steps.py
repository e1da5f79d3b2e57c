# SPDX-License-Identifier: Apache-2.0
"""Mutants of the fused steps on the CPU."""

from mutants import PACKAGE, Mutant

VALUES = (
    "tests/test_fused.py",
    "-k",
    "cpp and (test_add_layer_norm or test_bias_gelu or mixed or row_scale or without)",
)
MEMORY = ("tests/test_fused.py", "-k", "cpp and (strided or guard_arena or gelu_merges or expanded)")
HARD = ("tests/test_fused.py", "-k", "cpp and (offset or constant or eps or far or hard or float64 or is_that_of)")
CLASS_ROW = ("tests/test_fused.py", "-k", "cpp and (skip_cls or lone or nan_elsewhere)")
RUNS = ("tests/test_fused.py", "-k", "cpp and (runs or thread)")
CALLS = ("tests/test_fused_ops.py", "-k", "bad_calls or auto or another_struct or named or every_way")

STEPS, ROWS, NORMAL = "csrc/cpu/steps.cpp", "csrc/cpu/rows.h", "csrc/cpu/normal.h"
DISPATCH, PYTHON, BACKEND = "csrc/cpu/dispatch.cpp", f"{PACKAGE}/native_steps.py", f"{PACKAGE}/backends/cpp_steps.py"
CHECKS, BAD = f"{PACKAGE}/fused_checks.py", ("tests/test_fused_ops.py", "tests/test_bad_input.py", "-k", "not triton")
FUSED = f"{PACKAGE}/fused.py"

MUTANTS = [
    # Which rows and elements
    Mutant(
        "steps: rows of a clip taken as dense", STEPS, "+ r % c.tokens * x.token;", "+ r % c.tokens * c.dim;", MEMORY
    ),
    Mutant(
        "steps: clip stride ignored", STEPS, "r / c.tokens * x.batch +", "r / c.tokens * c.tokens * x.token +", MEMORY
    ),
    Mutant("steps: scale of another clip", STEPS, "r / c.tokens * c.scale_batch +", "0 * c.scale_batch +", VALUES),
    Mutant("steps: one scale per clip", STEPS, "r % c.tokens * c.scale_token]", "0 * c.scale_token]", VALUES),
    Mutant("steps: row 0 of the first clip alone", STEPS, "r % c.tokens == 0; }", "r == 0; }", CLASS_ROW),
    Mutant("steps: the tail of a row forgotten", ROWS, "if (i < D) f(i, Part{D - i});", "", VALUES),
    Mutant("steps: the tail of a row not in its sums", ROWS, "if (i < D) f(i, Part{D - i}, s[1]);", "", VALUES),
    Mutant(
        "steps: a tail reads a whole vector",
        ROWS,
        "memcpy(lanes, p, n * sizeof(T));",
        "memcpy(lanes, p, sizeof lanes);",
        MEMORY,
    ),
    Mutant(
        "steps: a tail writes a whole vector",
        ROWS,
        "memcpy(p, lanes, n * sizeof(T));",
        "memcpy(p, lanes, sizeof lanes);",
        MEMORY,
    ),
    Mutant(
        "steps: lanes behind a row are deviations",
        STEPS,
        "keep_below<C>(how.load(x) - mean, how.n, C(0))",
        "how.load(x) - mean",
        VALUES,
    ),
    Mutant("steps: a sum lost", ROWS, "(s[0].first + s[1].first)", "s[0].first", VALUES),
    Mutant("steps: a second sum lost", ROWS, "(s[2].second + s[3].second)", "s[2].second", VALUES),
    # LayerNorm
    Mutant(
        "steps: the norm of the sum that is not rounded",
        STEPS,
        "return sizeof(T) == 2 ? how.load(stored) : v;",
        "return (void)stored, v;",
        HARD,
    ),
    Mutant(
        "steps: sums of squares without the mean",
        STEPS,
        "Vec<C> d = centred(how, row + i, mean);",
        "Vec<C> d = centred(how, row + i, C(0));",
        HARD,
    ),
    Mutant(
        "steps: eps forgotten",
        STEPS,
        "(variance < 0 ? 0 : variance) + eps)",
        "(variance < 0 ? 0 : variance) + 1e-6)",
        HARD,
    ),
    Mutant("steps: branch not scaled", STEPS, "how.load(x + i) + b * scale;", "how.load(x + i) + b;", VALUES),
    Mutant(
        "steps: the skipped row sums its branch",
        STEPS,
        "if (f.c.branch.data && !f.skips(r))",
        "if (f.c.branch.data)",
        CLASS_ROW,
    ),
    Mutant(
        "steps: the skipped row's sum not written",
        STEPS,
        "if (f.c.branch.data && sum != x) memcpy(sum, x, D * sizeof(T));",
        "",
        CLASS_ROW,
    ),
    Mutant(
        "steps: gradient of the skipped branch",
        STEPS,
        "if (dbranch && skips) memset(dbranch, 0, D * sizeof(U));",
        "",
        CLASS_ROW,
    ),
    Mutant(
        "steps: branch gradient not scaled",
        STEPS,
        "how.store(dbranch + i, v * scale);",
        "how.store(dbranch + i, v);",
        VALUES,
    ),
    Mutant("steps: gradient of the sum forgotten", STEPS, "if (dsum) v += how.load(dsum + i);", "", VALUES),
    Mutant(
        "steps: mean gradient not removed",
        STEPS,
        "(how.load(grad + i) - mean - how",
        "(how.load(grad + i) - how",
        VALUES,
    ),
    Mutant(
        "steps: gradient along the row not removed",
        STEPS,
        "- how.load(row + i) * along) * q.rstd",
        ") * q.rstd",
        VALUES,
    ),
    Mutant(
        "steps: dweight without the score",
        STEPS,
        "how.load(dweight + i) + d * score",
        "how.load(dweight + i) + d",
        VALUES,
    ),
    Mutant(
        "steps: squares that overflow",
        STEPS,
        "if (!(variance < __builtin_inf())) return wide_statistics(row, D, eps);",
        "",
        HARD,
    ),
    # GELU
    Mutant("steps: the other tail", NORMAL, "u < 0.0f ? tail : 1.0f - tail", "u > 0.0f ? tail : 1.0f - tail", VALUES),
    Mutant("steps: a coefficient one part in fifty off", NORMAL, "4.416866663832851e-2f", "4.5e-2f", HARD),
    Mutant("steps: underflow wraps", NORMAL, "return z < -125.0f ? Vec<float>{} : p;", "return p;", HARD),
    Mutant("steps: density without its constant", NORMAL, "e * 0.39894228f", "e", VALUES),
    Mutant("steps: density in double", NORMAL, "0.39894228040143267794", "0.398942", HARD),
    Mutant("steps: gelu's derivative without the density", STEPS, "(n.cdf + u * n.density)", "n.cdf", VALUES),
    Mutant(
        "steps: dbias of the last row",
        STEPS,
        "how.store(dbias + i, how.load(dbias + i) + d);\n      });\n    }\n  }\n}\n\n// --- sums",
        "how.store(dbias + i, d);\n      });\n    }\n  }\n}\n\n// --- sums",
        VALUES,
    ),
    # Sums over rows
    Mutant("steps: the first run alone", STEPS, "run < job.runs; ++run) sum +=", "run < 1; ++run) sum +=", RUNS),
    Mutant(
        "steps: runs by the number of threads",
        DISPATCH,
        "job->runs = runs < kMaxRuns ? runs : kMaxRuns;",
        "job->runs = runs < c->max_threads ? runs : c->max_threads;",
        RUNS,
    ),
    Mutant(
        "steps: a worker's columns start late",
        STEPS,
        "f.first(vectors, worker) * W, end",
        "f.first(vectors, worker) * W + W, end",
        RUNS,
    ),
    Mutant(
        "steps: workers share their scratch",
        STEPS,
        "C* row = f.w.scratch + worker * 2 * f.w.row;",
        "C* row = f.w.scratch + job.workers * 0 * worker;",
        RUNS,
    ),
    # Calls
    Mutant(
        "steps: vectors taken in the rows' dtype",
        STEPS,
        "const bool same = dtype == job.c->dtype;",
        "const bool same = true | dtype;",
        VALUES,
    ),
    Mutant("steps: unknown steps accepted", DISPATCH, "step > TSK_BIAS_GELU_BWD)", "step > 99)", CALLS),
    Mutant(
        "steps: any dtype of vectors accepted",
        DISPATCH,
        "if (dtype != c->dtype && !mixes(c->dtype, dtype))",
        "if (dtype > 99)",
        CALLS,
    ),
    Mutant("steps: size of the struct not compared", PYTHON, "if size != _CALL.size:", "if not size:", CALLS),
    Mutant(
        "steps: the library passed over",
        FUSED,
        '"cpp": _cpp, "reference": lambda: REFERENCE}',
        '"reference": lambda: REFERENCE, "cpp": _cpp}',
        CALLS,
    ),
    Mutant(
        "host: vectors of any dtype are usual",
        CHECKS,
        "t.shape != width or t.dtype is not dtype or",
        "t.shape != width or",
        BAD,
    ),
    Mutant("host: vectors of any width are usual", CHECKS, "or t.shape != width or", "or", BAD),
    Mutant("host: a branch of any shape is usual", CHECKS, "t.shape == x.shape and t.dtype", "t.dtype", BAD),
    Mutant("host: any eps is usual", CHECKS, "        and _LEAST_EPS <= eps < math.inf\n", "", BAD),
    Mutant(
        "host: strided rows are usual",
        CHECKS,
        "or not x.is_contiguous():",
        "or False:",
        BAD,
    ),
    Mutant("steps: an expanded gradient read as dense", BACKEND, "dout.stride(2) == 1 or", "True or", MEMORY),
]
