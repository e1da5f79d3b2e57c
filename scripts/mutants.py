# SPDX-License-Identifier: Apache-2.0
"""The mutants of scripts/mutate.py: each is one wrong edit that some test must notice."""

from typing import NamedTuple

FORWARD = ("tests/test_attention.py", "-k", "(lengths or every_scheme) and cpp")
HARD = ("tests/test_attention.py", "tests/test_faults.py", "-k", "hard_inputs or scales or 18_ or 19_")
CLASS_ROW = ("tests/test_attention.py", "-k", "(class_row or every_scheme) and cpp")
HEAD_DIMS = ("tests/test_attention.py", "-k", "head_dims and cpp")
ROUNDING = ("tests/test_attention.py", "-k", "round_to_nearest")
LAYOUTS = ("tests/test_attention.py", "-k", "(layouts or strides or gradients_of) and cpp")
MEMORY = ("tests/test_memory_safety.py", "-k", "guard_arena or survives or class_weights")
THREADS = ("tests/test_determinism.py", "-k", "thread_counts")
OPS = ("tests/test_ops.py",)
PACKED = ("tests/test_packed.py",)
GRID = ("tests/test_grid.py",)
BAD_INPUT = ("tests/test_bad_input.py",)

CALL, FWD, BWD, SHORT = (f"csrc/cpu/{name}.h" for name in ("call", "forward", "backward", "short"))
GEMM, SIMD, DISPATCH = "csrc/cpu/gemm.h", "csrc/cpu/simd.h", "csrc/cpu/dispatch.cpp"
TILES, TILE_ATTENTION = "csrc/cpu/tiles.h", "csrc/cpu/tile_attention.h"
AMX = ("tests/test_attention.py", "-k", "(lengths or every_scheme or gradients_of) and amx")
AMX_CLASS_ROW = ("tests/test_attention.py", "-k", "(class_row or every_scheme) and amx")
AMX_HEAD_DIMS = ("tests/test_attention.py", "-k", "(head_dims or hard_inputs) and amx")
PACKAGE = "kernels/timesformer_kernels"
GRID_PY, OPS_PY, REGISTRY_PY = (f"{PACKAGE}/{name}.py" for name in ("grid", "ops", "registry"))
NATIVE_PY, CPP_PY = f"{PACKAGE}/native.py", f"{PACKAGE}/backends/cpp.py"


class Mutant(NamedTuple):
    """`old`, found exactly once in `file`, becomes `new`; at least one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    # Matrix units: on a chip that has them
    Mutant("AMX: the depth of a product ends early", TILES, "k < K; k += kDeep", "k + kDeep < K; k += kDeep", AMX),
    Mutant("AMX: pairs of one row", TILES, "from + (i + 1) * from_row + j", "from + i * from_row + j", AMX),
    Mutant(
        "AMX: sums of the blocks before forgotten",
        TILE_ATTENTION,
        "y_pairs, t.dim, sum, t.dim, i0 > 0)",
        "y_pairs, t.dim, sum, t.dim, false)",
        AMX,
    ),
    Mutant(
        "AMX: scores behind the keys count",
        TILE_ATTENTION,
        "keep_below<float>(exp(load(s + last) * scale - top), n - last, 0.0f)",
        "exp(load(s + last) * scale - top)",
        AMX,
    ),
    Mutant(
        "AMX: rows behind the queries are left over",
        TILE_ATTENTION,
        "memset(ds + n * t.depth_keys, 0, (depth - n) * t.depth_keys * sizeof(T));",
        "",
        AMX_CLASS_ROW,
    ),
    Mutant(
        "AMX: the class row's weight dropped",
        TILE_ATTENTION,
        "first && !global ? c.weight(b, g) : 1.0f",
        "1.0f",
        AMX_CLASS_ROW,
    ),
    Mutant(
        "AMX: dK without the scale",
        TILE_ATTENTION,
        "store_row<T>(dk_rows(j), dk + j * t.dim, c.D, c.scale)",
        "store_row<T>(dk_rows(j), dk + j * t.dim, c.D, 1.0f)",
        AMX,
    ),
    Mutant(
        "AMX: elements behind head_dim are not zero",
        TILE_ATTENTION,
        "memset(to + i * row + D, 0, (row - D) * sizeof(BFloat16));",
        "",
        AMX_HEAD_DIMS,
    ),
    # Layout and strides
    Mutant(
        "rows of a group taken as neighbours",
        CALL,
        ": patches + tokens[i] * stride;",
        ": patches + i * stride;",
        FORWARD,
    ),
    Mutant(
        "group axes swapped",
        CALL,
        "g / q[2].size % q[1].size * q[1].step",
        "g / q[2].size % q[1].size * q[2].step",
        FORWARD,
    ),
    Mutant(
        "head stride of another tensor axis",
        CALL,
        "b * x.batch + h * x.head + token",
        "b * x.batch + h * x.token + token",
        FORWARD,
    ),
    Mutant("patches start at row 0", CALL, "first(a.cls != TSK_CLS_NONE)", "first(0)", FORWARD),
    Mutant(
        "short sequences assumed dense",
        SHORT,
        "D = c.D, Dp = c.Dp, step = a.sequence[0].step;",
        "D = c.D, Dp = c.Dp, step = 1;",
        FORWARD,
    ),
    Mutant(
        "short kernel although the class row is a key", SHORT, "return !job.cls_key && job.L", "return job.L", CLASS_ROW
    ),
    Mutant(
        "per_group without the class key",
        DISPATCH,
        "a->cls >= TSK_CLS_PER_GROUP;",
        "a->cls > TSK_CLS_PER_GROUP;",
        CLASS_ROW,
    ),
    # Tails
    Mutant(
        "tail mask of the softmax dropped",
        CALL,
        "keep_below<C>(exp(load(s + last) - top), n - last, C(0))",
        "exp(load(s + last) - top)",
        FORWARD,
    ),
    Mutant(
        "padding may win the maximum",
        CALL,
        "keep_below<C>(load(s + last), n - last, -C(__builtin_inf()))",
        "load(s + last)",
        HARD,
    ),
    Mutant("tail mask of short sequences dropped", SHORT, "column < int32_t(L) - n * W ?", "column < LQ ?", FORWARD),
    Mutant(
        "last element of a head's row dropped",
        CALL,
        "for (int64_t i = 0; i < n; ++i) v[i] = to_compute(p[i]);",
        "for (int64_t i = 0; i + 1 < n; ++i) v[i] = to_compute(p[i]);",
        HEAD_DIMS,
    ),
    Mutant("a deep product keeps its last part only", GEMM, "k += depth, add = true)", "k += depth)", HEAD_DIMS),
    Mutant(
        "only the last block of queries reaches dv",
        BWD,
        "p, 1, c.Kp, dout, c.Dp, dv, c.Dp, i0 > 0);",
        "p, 1, c.Kp, dout, c.Dp, dv, c.Dp, false);",
        FORWARD,
    ),
    # Softmax and its derivative
    Mutant("maximum not subtracted", CALL, "*top = hmax<C>(m);", "*top = 0;", HARD),
    Mutant(
        "scale left out of short scores",
        SHORT,
        "load(row + n * W) * scale : splat",
        "load(row + n * W) : splat",
        FORWARD,
    ),
    Mutant(
        "delta zero",
        BWD,
        "delta = normalise_and_dot<C>(pi, dsi, c.Kp, factor);",
        "normalise_and_dot<C>(pi, dsi, c.Kp, factor), delta = 0;",
        FORWARD,
    ),
    Mutant("delta zero in short sequences", SHORT, "(load(y) - delta) * scale);", "load(y) * scale);", FORWARD),
    Mutant("scale left out of short dq and dk", SHORT, "(load(y) - delta) * scale);", "(load(y) - delta));", FORWARD),
    Mutant(
        "scale left out of dq",
        BWD,
        "store_row<T>(dq_rows(i0 + i), dq + i * c.Dp, c.D, c.scale);",
        "store_row<T>(dq_rows(i0 + i), dq + i * c.Dp, c.D, C(1));",
        FORWARD,
    ),
    Mutant(
        "scale left out of dk",
        BWD,
        "store_row<T>(dk_rows(j), dk + j * c.Dp, c.D, C(1));",
        "store_row<T>(dk_rows(j), dk + j * c.Dp, c.D, C(1) / c.scale);",
        FORWARD,
    ),
    Mutant(
        "dk with dS not transposed", SHORT, "mix_into(a.dk, ds, 1, LQ, q);", "mix_into(a.dk, ds, LQ, 1, q);", FORWARD
    ),
    Mutant("dv with P not normalised", SHORT, "store(row + n * W, x[n] * sum);", "store(row + n * W, x[n]);", FORWARD),
    # The class row
    Mutant(
        "class weights of the first clip for all", CALL, "C(a.cls_weights[b * G + g])", "C(a.cls_weights[g])", CLASS_ROW
    ),
    Mutant("class row summed, not averaged", CALL, ": C(1) / C(G); }", ": C(1); }", CLASS_ROW),
    Mutant(
        "class gradient of one group only",
        BWD,
        "for (int64_t g = 0; g < c.G; ++g) {",
        "for (int64_t g = 0; g < 1; ++g) {",
        CLASS_ROW,
    ),
    Mutant(
        "class shares of the clips collide",
        CALL,
        "return ((b * H + h) * G + g) * Dp;",
        "return (h * G + g) * Dp;",
        CLASS_ROW,
    ),
    Mutant(
        "class weight missing in the backward",
        BWD,
        "mean ? c.weight(b, g) : C(1));",
        "mean ? C(1) / C(c.G) : C(1));",
        CLASS_ROW,
    ),
    Mutant(
        "global class query leaves itself out",
        FWD,
        "for (int64_t j = 0; j < a.tokens; ++j) add_row<T>(row",
        "for (int64_t j = 1; j < a.tokens; ++j) add_row<T>(row",
        CLASS_ROW,
    ),
    Mutant("global class key counted in every group", BWD, "pi[0] = 0;", "", CLASS_ROW),
    # Precision
    Mutant("bfloat16 stores truncate", SIMD, "(u + 0x7fff + (u >> 16 & 1)) >> 16);", "u >> 16);", ROUNDING),
    Mutant(
        "float16 subnormals flushed",
        SIMD,
        "bits_to_float(rest << 13) * 0x1p112f",
        "(rest < 0x400 ? 0.0f : bits_to_float(rest << 13) * 0x1p112f)",
        ("tests/test_faults.py", "-k", "subnormal"),
    ),
    Mutant(
        "exp of few terms",
        SIMD,
        "Vec<float> p = r * 1.383678987622261e-3f + 8.374856784939766e-3f;",
        "Vec<float> p = {};",
        FORWARD,
    ),
    # Memory and threads
    Mutant("workspace one matrix short", CALL, "by_short = 5 * packed;", "by_short = 3 * packed;", MEMORY),
    Mutant(
        "workers leave out an item",
        CALL,
        "end = n * (worker + 1) / job.workers;\n    int64_t h",
        "end = n * (worker + 1) / job.workers - (worker > 0);\n    int64_t h",
        THREADS,
    ),
    Mutant(
        "sums of four lanes in another order",
        SHORT,
        "fold<C, kWithin>(fold<C, kWithin>(a[0], a[2]), fold<C, kWithin>(a[1], a[3]))",
        "fold<C, kWithin>(fold<C, kWithin>(a[0], a[1]), fold<C, kWithin>(a[2], a[3]))",
        FORWARD,
    ),
    Mutant(
        "columns nobody wrote are read",
        SHORT,
        "at_most(NV, (L + W - 1) / W)",
        "int64_t(NV)",
        MEMORY,
    ),
    # Python: the view
    Mutant(
        "wrong token order",
        GRID_PY,
        'if order == "space_major" else (width',
        'if order != "space_major" else (width',
        GRID,
    ),
    Mutant(
        "groups and sequence of a comb swapped",
        GRID_PY,
        "groups.append((axis.groups, step))\n            sequence.append((run, step * axis.groups))",
        "sequence.append((axis.groups, step))\n            groups.append((run, step * axis.groups))",
        GRID,
    ),
    Mutant(
        "blocks one token apart",
        GRID_PY,
        "groups.append((axis.groups, step * run))",
        "groups.append((axis.groups, step))",
        GRID,
    ),
    Mutant("axes merged that do not join", GRID_PY, "if out and out[-1][1] == size * step:", "if out:", GRID),
    Mutant(
        "time and space swapped",
        GRID_PY,
        '"time": Scheme(GROUPED, GROUPED, ATTENDED)',
        '"time": Scheme(ATTENDED, ATTENDED, GROUPED)',
        FORWARD,
    ),
    Mutant("mixed dtypes let through", GRID_PY, "if x.dtype != q.dtype:", "if False:", BAD_INPUT),
    # Python: operators and backends
    Mutant(
        "named backend falls back",
        REGISTRY_PY,
        "    if reason := backend.why_not(device.type, dtype, head_dim):\n        raise",
        "    if (reason := backend.why_not(device.type, dtype, head_dim)) and name != 'cpp':\n        raise",
        BAD_INPUT,
    ),
    Mutant(
        "fake keeps the strides of q",
        OPS_PY,
        "return _results(q, q.new_empty(q.shape), stats)",
        "return _results(q, torch.empty_like(q), stats)",
        OPS,
    ),
    Mutant(
        "double backward of the op allowed",
        OPS_PY,
        "torch.library.register_autograd(BWD, _refuse, lib=LIBRARY)",
        "",
        OPS,
    ),
    Mutant(
        "forward mode reaches the bare function",
        OPS_PY,
        "if wants_grad or forward_ad._current_level >= 0:",
        "if wants_grad:",
        OPS,
    ),
    Mutant("vmap folds the wrong dimension", OPS_PY, "else x.movedim(dim, 0)", "else x", OPS),
    Mutant(
        "saved tensors not watched",
        OPS_PY,
        "        ctx.save_for_backward(q, k, v, cls_weights, *(() if stats is None else (out, stats)))",
        "        ctx.kept = (q, k, v, cls_weights, *(() if stats is None else (out, stats)))",
        ("tests/test_faults.py", "-k", "25"),
    ),
    Mutant("expanded gradient taken as dense", CPP_PY, "        dout = dout.contiguous()", "        pass", LAYOUTS),
    Mutant(
        "strided class weights taken as dense",
        CPP_PY,
        "None if cls_weights is None else cls_weights.contiguous()",
        "cls_weights",
        MEMORY,
    ),
    Mutant("key and global confused", NATIVE_PY, '"key": 3, "global": 4', '"key": 4, "global": 3', CLASS_ROW),
    Mutant(
        "packed gradient in another order",
        OPS_PY,
        "_backward(*inputs, grads=dqkv.unbind(2))",
        "_backward(*inputs, grads=dqkv.unbind(2)[::-1])",
        PACKED,
    ),
    Mutant(
        "packed gradient put together by a copy",
        OPS_PY,
        "        if torch.is_grad_enabled():\n            dqkv",
        "        if True:\n            dqkv",
        PACKED,
    ),
]
