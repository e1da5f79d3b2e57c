# SPDX-License-Identifier: Apache-2.0
"""Mutants of the CUDA kernels, for scripts/mutate.py; killed by their execution on the CPU (tests/simt)."""

from mutants import Mutant

FILE = "tests/test_cuda.py"
LONG = (FILE, "-k", "long_lengths or space_on_tensor or class_row_weights or keys_of_weight or every_scheme_on")
SHORT = (FILE, "-k", "short or not_finite or class_row_weights")
SHORT_MADE, TILES = ("tests/test_cuda_short.py",), ("tests/test_cuda_generic.py",)
GUARDED = (FILE, "-k", "guard_arena")
PLAIN = (FILE, "-k", "generic_lengths or class_row_weights")
SHORT_CUH, ROWS, RESIDENT, STREAMING, GENERIC, CLASS_ROW, LAUNCH = (
    f"csrc/cuda/{name}"
    for name in ("short.cuh", "rows.cuh", "resident.cuh", "streaming.cuh", "generic.cuh", "class_row.cuh", "launch.cu")
)

MUTANTS = [
    # Rows in shared memory, 17 members and more
    Mutant(
        "CUDA: chunks of one row not turned against another's",
        ROWS,
        "cp_async16(chunk_of<D>(to, row, chunk), from",
        "cp_async16(to + row * D + 8 * chunk, from",
        LONG,
    ),
    Mutant(
        "CUDA: keys that do not exist have scores",
        ROWS,
        "column < members ? s[i >> 2][i & 3] * scale : -INFINITY",
        "column <= members ? s[i >> 2][i & 3] * scale : -INFINITY",
        LONG,
    ),
    Mutant("CUDA: the class row is a query", ROWS, "return p.role == kKey; }", "return 0 * p.role; }", LONG),
    Mutant(
        "CUDA: sums do not shrink",
        ROWS,
        "total[half] *= shrink[half], dot[half] *= shrink[half];",
        "dot[half] *= shrink[half];",
        LONG,
    ),
    Mutant(
        "CUDA: sum(e * dp) does not shrink",
        ROWS,
        "total[half] *= shrink[half], dot[half] *= shrink[half];",
        "total[half] *= shrink[half];",
        LONG,
    ),
    Mutant(
        "CUDA: nothing but -inf so far is NaN",
        ROWS,
        "const float zero = now == -INFINITY ? 0.0f : now;",
        "const float zero = now;",
        LONG,
    ),
    Mutant(
        "CUDA: another row taken for the class row",
        ROWS,
        "if (part && row + g == 0)",
        "if (part && row + g == 1)",
        LONG,
    ),
    Mutant(
        "CUDA: share of a group missing, resident",
        RESIDENT,
        "factor[half] *= class_share(p, at.batch, at.group);",
        "factor[half] *= 1.0f;",
        LONG,
    ),
    Mutant(
        "CUDA: queries fetched while keys are read",
        RESIDENT,
        "  __syncthreads();  // nobody looks at keys and values any more\n",
        "",
        LONG,
    ),
    Mutant(
        "CUDA: values before they have landed",
        ROWS,
        "    cp_async_wait<0>();\n    __syncwarp();\n    to.load(own);",
        "    __syncwarp();\n    to.load(own);",
        LONG,
    ),
    # What passes by
    Mutant("CUDA: a block read before it has landed", STREAMING, "cp_async_wait<1>();", "cp_async_wait<2>();", LONG),
    Mutant(
        "CUDA: a block overwritten while it is read",
        STREAMING,
        "      __syncthreads();  // the next copy but one comes where these rows are\n",
        "",
        LONG,
    ),
    Mutant(
        "CUDA: two blocks in one place",
        STREAMING,
        "return rows + (2 * turn + which)",
        "return rows + (0 * turn + which)",
        LONG,
    ),
    Mutant(
        "CUDA: the class key counted in every group, scores",
        STREAMING,
        "p.role == kGlobal && group > 0 && row == 0",
        "p.role == kGlobal && group < 0 && row == 0",
        LONG,
    ),
    Mutant(
        "CUDA: the class key counted in every group, gradients of keys",
        STREAMING,
        "p.role == kGlobal && at.group > 0 && row == 0",
        "p.role == kGlobal && at.group < 0 && row == 0",
        LONG,
    ),
    Mutant(
        "CUDA: parts of a global class row divided too early",
        STREAMING,
        "factor[half] = global ? 1.0f : reciprocal(total);",
        "factor[half] = reciprocal(total);",
        LONG,
    ),
    Mutant(
        "CUDA: sum(p * dp) of a global class row from its own group",
        STREAMING,
        "factor[half] = reciprocal(from[1]), delta[half] = 0;",
        "factor[half] = reciprocal(from[1]);",
        LONG,
    ),
    # Short sequences, the plain kernel, the class row
    Mutant(
        "CUDA: off-diagonal blocks of a transpose not swapped",
        SHORT_CUH,
        "transposed(w[2]), to[2]",
        "transposed(w[1]), to[2]",
        SHORT,
    ),
    Mutant(
        "CUDA: finiteness of dout not looked at",
        SHORT_CUH,
        "note_rows<T, D>(note_rows<T, D>(note_rows<T, D>(0, k), q), dout)",
        "note_rows<T, D>(note_rows<T, D>(0, k), q)",
        SHORT,
    ),
    Mutant(
        "CUDA: class key counted in every group, plain",
        GENERIC,
        "return p.role != kGlobal || query != 0 || key != 0 || group == 0;",
        "return p.role >= 0 || query + key + group;",
        PLAIN,
    ),
    Mutant(
        "CUDA: share of a group missing, plain",
        GENERIC,
        "weights[lane] = x * share;",
        "weights[lane] = x + 0 * share;",
        PLAIN,
    ),
    Mutant(
        "CUDA: weights of the groups ignored",
        CLASS_ROW,
        "share = class_share(p, at.batch, g);",
        "share = 1.f / float(G);",
        PLAIN,
    ),
    Mutant(
        "CUDA: workspace parts on one another",
        LAUNCH,
        "bytes += (numbers * int64_t(sizeof(float)) + 63) / 64 * 64;",
        "bytes += 64;",
        LONG,
    ),
    # Kernels made for an M, halves of a tile apart; rows in tiles of the plain kernels
    Mutant(
        "CUDA: sequences of a half not told apart",
        SHORT_CUH,
        "n == i / 2 && g / MEMBERS == (2 * t + (i & 1)) / MEMBERS",
        "n == i / 2",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: the second half of a product lost",
        SHORT_CUH,
        "sums[r][2] = other[2], sums[r][3] = other[3];",
        "",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: the second half has no turn",
        SHORT_CUH,
        "row.sequence % (kHalf ? kHalf : 1)",
        "row.sequence + 0 * (kHalf ? kHalf : 1)",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: rows of the second half from the first group",
        SHORT_CUH,
        "group_row(p, b.group) + step",
        "start + step",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: neighbours in a half are taken for finite",
        SHORT_CUH,
        "MEMBERS >= 8 || all_finite(note_rows<T, D>(0, v))",
        "MEMBERS >= 4 || all_finite(note_rows<T, D>(0, v))",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: a tile read before all have filled it",
        GENERIC,
        "D, wide, lane);\n    __syncwarp();",
        "D, wide, lane);",
        TILES,
    ),
    Mutant(
        "CUDA: every tile from the first columns",
        GENERIC,
        "load16(row_of(head, x, from) + first + column)",
        "load16(row_of(head, x, from) + column)",
        TILES,
    ),
    Mutant(
        "CUDA: columns past the end of a row",
        GENERIC,
        "member < count && first + column < D",
        "member < count",
        GUARDED,
    ),
    Mutant("CUDA: distance of tokens not looked at", GENERIC, "p.tokens == 1 || x.token % n == 0", "true", TILES),
    Mutant("CUDA: alignment of dout not looked at", GENERIC, "!p.dq.data || reads_wide(p, p.dout)", "true", TILES),
]
