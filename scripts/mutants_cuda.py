# SPDX-License-Identifier: Apache-2.0
"""Mutants of the CUDA kernels, for scripts/mutate.py; killed by their execution on the CPU (tests/simt)."""

from mutants import Mutant

FILE = "tests/test_cuda.py"
LONG = (FILE, "-k", "long_lengths or space_on_tensor or class_row_weights or keys_of_weight or every_scheme_on")
SHORT = (FILE, "-k", "short or not_finite or class_row_weights")
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
        ROWS,
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
]
