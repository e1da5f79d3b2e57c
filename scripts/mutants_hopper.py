# SPDX-License-Identifier: Apache-2.0
"""Mutants of the kernel of compute capability 9.0, for scripts/mutate.py; killed by its execution on the CPU."""

from mutants import Mutant

TESTS = (
    "tests/test_cuda_hopper.py",
    "-k",
    "lengths or wide or schemes_of or keys_of_weight or order_of or other or scales or statistics",
)
BACKWARD_TESTS = (
    "tests/test_cuda_hopper_backward.py",
    "-k",
    "lengths or short or scales or weights or guard or order_of or other or weight_zero or far_below or not_finite",
)
HOPPER, BACKWARD, CLASS_ROW, PTX = (
    f"csrc/cuda/{name}.cuh" for name in ("hopper", "hopper_backward", "class_row", "ptx")
)


def mutant(name, before, after, source=HOPPER):
    return Mutant(f"Hopper: {name}", source, before, after, TESTS)


def backward(name, before, after, source=BACKWARD):
    return Mutant(f"Hopper backward: {name}", source, before, after, BACKWARD_TESTS)


MUTANTS = [
    # What is asynchronous
    mutant("barriers that copies do not see", "  fence_async();\n", ""),
    mutant(
        "weights without a fence",
        "      wgmma_fence();\n      start_values<4>(acc, w, at, now);\n",
        "      start_values<4>(acc, w, at, now);\n",
    ),
    mutant(
        "scores not waited for",
        "      wgmma_wait<0>();\n      if (asks) weigh<4, true, T>",
        "      if (asks) weigh<4, true, T>",
    ),
    mutant(
        "sums not waited for",
        "      start_values<kSteps>(acc, w, at, turn.stage);\n      wgmma_wait<0>();\n",
        "      start_values<kSteps>(acc, w, at, turn.stage);\n",
    ),
    mutant(
        "keys before they have landed",
        "      barrier_wait(at.full + turn.stage, turn.round & 1);\n      wgmma_fence();\n",
        "      wgmma_fence();\n",
    ),
    mutant("the first keys before they have landed", "    barrier_wait(at.full, 0);\n", ""),
    mutant(
        "parity of the wrong round",
        "      barrier_wait(at.full + turn.stage, turn.round & 1);\n      wgmma_fence();\n",
        "      barrier_wait(at.full + turn.stage, 0);\n      wgmma_fence();\n",
    ),
    mutant(
        "a stage fetched over while it is read", "    barrier_wait(at.empty + free, (turn.round - before) & 1);\n", ""
    ),
    mutant("a stage waited for in the wrong round", "(turn.round - before) & 1", "turn.round & 1"),
    mutant(
        "a stage given back before its values are read",
        "      wgmma_wait<1>();\n      if (block.lane == 0) barrier_arrive(at.empty + now);\n",
        "      if (block.lane == 0) barrier_arrive(at.empty + now);\n",
    ),
    mutant(
        "the class row put together before its parts are there",
        "  await_kernel_before();\n  const int D = p.head_dim, G = p.groups;\n",
        "  const int D = p.head_dim, G = p.groups;\n",
        CLASS_ROW,
    ),
    mutant(
        "four warps too many waited for", "2 * place.tile + 1 < tiles ? kHopperWarps : kHopperWarps / 2", "kHopperWarps"
    ),
    mutant(
        "fewer bytes expected than come",
        "barrier_expect(at.full + stage, at.kBytes)",
        "barrier_expect(at.full + stage, at.kBytes / 2)",
    ),
    mutant(
        "panels at no multiple of 1024",
        "(-shared_address(shared) & 1023) / sizeof(T)",
        "(-shared_address(shared) & 127) / sizeof(T)",
    ),
    # Where operands are
    mutant("eight rows 512 bytes from the next", "1 << 30 | 1024 >> 4", "1 << 30 | 512 >> 4", PTX),
    mutant("operands not swizzled", "uint64_t(1 << 30 | 1024 >> 4)", "uint64_t(1024 >> 4)", PTX),
    mutant(
        "columns of the keys taken twice",
        "panel_operand(at.keys(stage, k / 4), 0, 16 * (k & 3))",
        "panel_operand(at.keys(stage, k / 4), 0, 16 * (k & 1))",
    ),
    mutant(
        "rows of the values taken twice",
        "panel_operand(at.values(stage, panel), 16 * i, 0)",
        "panel_operand(at.values(stage, panel), 16 * (i & 1), 0)",
    ),
    mutant("the second panel of values missed", "wgmma<T, 64, true>(acc + 8 * panel,", "wgmma<T, 64, true>(acc,"),
    mutant(
        "keys of another head",
        "{64 * panel, key, place.group, place.head, place.batch}",
        "{64 * panel, key, place.group, 0, place.batch}",
    ),
    mutant(
        "the class row taken for a patch",
        "static_cast<char*>(x.data) + 2 * p.first * token",
        "static_cast<char*>(x.data) + 0 * p.first * token",
    ),
    mutant(
        "steps of groups and sequences exchanged",
        "{p.sequence.step[0] * token, p.group.step[0] * token,",
        "{p.group.step[0] * token, p.sequence.step[0] * token,",
    ),
    # Softmax
    mutant("keys that do not exist have scores", ">= exist) s[STEPS - 1]", "> exist) s[STEPS - 1]"),
    mutant("the class key dropped", "if (p.role != kNoMember)  // the one", "if (p.role == kGlobal)  // the one"),
    mutant(
        "the class key counted in every group",
        "p.role == kGlobal && place.group > 0 && row == 0",
        "p.role == kGlobal && place.group < 0 && row == 0",
    ),
    mutant("every row skips the class key", "skip && half == 0 && (threadIdx.x & 31) < 4", "skip"),
    mutant("the class key counted by every lane", "t == 0 ? e[half] : 0.0f;", "e[half];"),
    mutant("the class value missing", "acc[c][0] = e[0] * v.x,", "acc[c][0] = 0 * v.x,"),
    mutant("sums do not shrink", "    sums.total[half] *= shrink[half];\n", ""),
    mutant(
        "weighted sums do not shrink",
        "acc[i >> 2][i & 3] *= shrink[i >> 1 & 1];",
        "acc[i >> 2][i & 3] *= shrink[i >> 1 & 1] > 2.0f ? 2.0f : 1.0f;",
    ),
    mutant(
        "nothing but -inf so far is NaN", "const float zero = now == -INFINITY ? 0.0f : now;", "const float zero = now;"
    ),
    mutant("a class score of -inf is NaN", "ex2(top - (top == -INFINITY ? 0.0f : top))", "ex2(top - top)"),
    # Which calls
    mutant("negative scales", "|| !(p.scale > 0)) return false;", "|| p.scale == 0) return false;"),
    mutant("an empty kernel launched", "return attributes.maxThreadsPerBlock >= kHopperThreads;", "return true;"),
    mutant("sequences of several axes", "p.sequence.count > 1 || p.group.count > 1 ||", "p.sequence.count > 3 ||"),
    # Backward: what is asynchronous
    backward(
        "a stage fetched over while it is read",
        "    barrier_wait(at.empty + free,",
        "    if (free < 0) barrier_wait(at.empty + free,",
        HOPPER,
    ),
    backward("a stage waited for in the wrong round", "(turn.round - before) & 1", "turn.round & 1", HOPPER),
    backward("rows before they have landed", "    barrier_wait(at.full + turn.stage, turn.round & 1);\n", ""),
    backward(
        "parity of the wrong round",
        "barrier_wait(at.full + turn.stage, turn.round & 1)",
        "barrier_wait(at.full + turn.stage, 0)",
    ),
    backward(
        "a stage given back before it is read",
        "    step(turn.stage, row);\n    if ((threadIdx.x & 31) == 0) barrier_arrive(at.empty + turn.stage);\n",
        "    if ((threadIdx.x & 31) == 0) barrier_arrive(at.empty + turn.stage);\n    step(turn.stage, row);\n",
    ),
    backward("numbers before they are there", "  await_kernel_before();  // the numbers", "  // the numbers"),
    backward(
        "the class row put together before its parts are there",
        "  await_kernel_before();\n  const int D = p.head_dim;\n",
        "  const int D = p.head_dim;\n",
        CLASS_ROW,
    ),
    backward(
        "queries' scores not waited for",
        "at.values(stage, 0), 0);\n  wgmma_wait<1>();",
        "at.values(stage, 0), 0);\n  wgmma_wait<2>();",
    ),
    backward(
        "dp not waited for",
        "  wgmma_wait<0>();\n#pragma unroll\n  for (int i = 0; i < 8 * STEPS",
        "#pragma unroll\n  for (int i = 0; i < 8 * STEPS",
    ),
    backward(
        "keys' scores not waited for",
        "at.values(stage, 0), first);\n  wgmma_wait<1>();\n#pragma unroll\n  for (int i = 0; i < 8; ++i) {  // columns",
        "at.values(stage, 0), first);\n  wgmma_wait<2>();\n#pragma unroll\n  for (int i = 0; i < 8; ++i) {  // columns",
    ),
    backward(
        "keys' dp not waited for",
        "  start_mix(dv, w, at.values(stage, 0), first);\n  wgmma_wait<1>();\n",
        "  start_mix(dv, w, at.values(stage, 0), first);\n  wgmma_wait<2>();\n",
    ),
    backward(
        "dk not waited for",
        "  start_mix(dk, dw, at.keys(stage, 0), first);\n  wgmma_wait<0>();\n",
        "  start_mix(dk, dw, at.keys(stage, 0), first);\n",
    ),
    # Backward: where operands are, and which
    backward(
        "the second 32 queries are the first",
        "meet_queries(at, stage, 32, left - 32,",
        "meet_queries(at, stage, 0, left - 32,",
    ),
    backward("numbers of the first 32 queries", "at.numbers(stage) + first + 2", "at.numbers(stage) + 2"),
    backward(
        "dk of dout", "start_mix(dk, dw, at.keys(stage, 0), first)", "start_mix(dk, dw, at.values(stage, 0), first)"
    ),
    backward("dq of values", "start_mix(acc, w, at.keys(stage, 0), 0)", "start_mix(acc, w, at.values(stage, 0), 0)"),
    backward("rows taken twice", "panel_operand(panel, first + 16 * i, 0)", "panel_operand(panel, first, 0)"),
    backward(
        "numbers from the class row on", "p.delta + 4 * (p.role != kNoMember)", "p.delta + 0 * (p.role != kNoMember)"
    ),
    backward(
        "numbers of another head",
        "{0, key, place.group, place.head, place.batch}",
        "{0, key, place.group, 0, place.batch}",
        HOPPER,
    ),
    backward("no workspace yet no plan", "if (!p.delta) return true;", "if (!p.delta) return false;"),
    backward("numbers swizzled", "CU_TENSOR_MAP_SWIZZLE_NONE", "CU_TENSOR_MAP_SWIZZLE_128B"),
    # Backward: scores, the class row
    backward("keys that do not exist have scores", "+ (i & 1) >= exist)", "+ (i & 1) > exist)"),
    backward("queries that do not exist have scores", "& 3) >= exist) x = 0;", "& 3) > exist) x = 0;"),
    backward(
        "the class key dropped",
        "  if (p.role != kNoMember) {\n    float s[2], dp[2];",
        "  if (p.role == kGlobal) {\n    float s[2], dp[2];",
    ),
    backward(
        "the class query dropped",
        "  if (p.role >= kPerGroup) {\n    const float* of",
        "  if (p.role >= kGlobal) {\n    const float* of",
    ),
    backward(
        "the class row a query where it is none",
        "  if (p.role >= kPerGroup) {\n    const float* of",
        "  if (p.role >= kKey) {\n    const float* of",
    ),
    backward(
        "the class key counted in every group by its query",
        "s[0] = 0;\n    add_one(dq, s, block.head(p.k));",
        "s[0] *= 1;\n    add_one(dq, s, block.head(p.k));",
    ),
    backward(
        "the class query counted in every group by its key",
        "s[0] = 0;\n    add_one(dv, s, block.head(p.dout));",
        "s[0] *= 1;\n    add_one(dv, s, block.head(p.dout));",
    ),
    backward(
        "rows of a class row's lanes skipped",
        "row == 0 && block.lane < 4) s[0] = 0;\n    add_one(dv",
        "row == 0) s[0] = 0;\n    add_one(dv",
    ),
    backward("row 0 of dq left as it was", "  if (p.role == kNoMember) block.zero(p.dq);\n", ""),
    backward("row 0 of dk left as it was", "  if (p.role == kNoMember) block.zero(p.dk), block.zero(p.dv);\n", ""),
    backward("delta without the factor", "of.shift[half] = delta[half] * factor[half]", "of.shift[half] = delta[half]"),
    # Backward: which calls
    backward(
        "an empty kernel launched",
        "if (p.batch < 1 || !hopper_compiled(device)) return false;",
        "if (p.batch < 1) return false;",
    ),
    backward("wide heads", "p.head_dim != 64 || ", "p.head_dim < 64 || "),
    backward("sequences of several axes", "p.sequence.count > 1 || p.group.count > 1)", "p.sequence.count > 3)"),
]
