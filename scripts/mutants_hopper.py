# SPDX-License-Identifier: Apache-2.0
"""Mutants of the kernel of compute capability 9.0, for scripts/mutate.py; killed by its execution on the CPU."""

from mutants import Mutant

TESTS = (
    "tests/test_cuda_hopper.py",
    "-k",
    "lengths or wide or schemes_of or keys_of_weight or order_of or other or scales or statistics",
)
HOPPER, PTX = "csrc/cuda/hopper.cuh", "csrc/cuda/ptx.cuh"


def mutant(name, before, after, source=HOPPER):
    return Mutant(f"Hopper: {name}", source, before, after, TESTS)


MUTANTS = [
    # What is asynchronous
    mutant("barriers that copies do not see", "    fence_async();\n", ""),
    mutant(
        "scores without a fence",
        "float s[STEPS][2][4], shrink[2];\n  wgmma_fence();\n",
        "float s[STEPS][2][4], shrink[2];\n",
    ),
    mutant("scores not waited for", "k > 0);\n  wgmma_commit();\n  wgmma_wait<0>();\n", "k > 0);\n  wgmma_commit();\n"),
    mutant("sums not waited for", "true);\n  wgmma_commit();\n  wgmma_wait<0>();\n}", "true);\n  wgmma_commit();\n}"),
    mutant(
        "keys before they have landed",
        "      barrier_wait(at.full + stage, round & 1);\n      attend<4, true>",
        "      attend<4, true>",
    ),
    mutant(
        "the last keys before they have landed",
        "    const int left = p.length - key;\n    barrier_wait(at.full + stage, round & 1);\n",
        "    const int left = p.length - key;\n",
    ),
    mutant(
        "parity of the wrong round",
        "      barrier_wait(at.full + stage, round & 1);\n      attend<4, true>",
        "      barrier_wait(at.full + stage, 0);\n      attend<4, true>",
    ),
    mutant(
        "a stage fetched over while it is read",
        "        barrier_wait(at.empty + free, (stage >= 2 ? round : round - 1) & 1);\n",
        "",
    ),
    mutant("a stage waited for in the wrong round", "(stage >= 2 ? round : round - 1) & 1", "round & 1"),
    mutant(
        "a stage given back before its values are read",
        "      attend<4, true>(at, stage, q, scale, 64, sums, acc);\n      done();\n",
        "      const int was = stage;\n      done();\n      attend<4, true>(at, was, q, scale, 64, sums, acc);\n",
    ),
    mutant(
        "four warps too many waited for", "2 * place.tile + 1 < tiles ? kHopperWarps : kHopperWarps / 2", "kHopperWarps"
    ),
    mutant(
        "fewer bytes expected than come",
        "barrier_expect(at.full + stage, Stages<T, D>::kBytes)",
        "barrier_expect(at.full + stage, Stages<T, D>::kBytes / 2)",
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
        "acc[c][i] *= shrink[i >> 1];",
        "acc[c][i] *= shrink[i >> 1] > 2.0f ? 2.0f : 1.0f;",
    ),
    mutant(
        "nothing but -inf so far is NaN", "const float zero = now == -INFINITY ? 0.0f : now;", "const float zero = now;"
    ),
    mutant("a class score of -inf is NaN", "ex2(top - (top == -INFINITY ? 0.0f : top))", "ex2(top - top)"),
    # Which calls
    mutant("negative scales", "|| !(p.scale > 0)) return false;", "|| p.scale == 0) return false;"),
    mutant("an empty kernel launched", "return attributes.maxThreadsPerBlock >= kHopperThreads;", "return true;"),
    mutant("sequences of several axes", "p.sequence.count > 1 || p.group.count > 1 ||", "p.sequence.count > 3 ||"),
]
