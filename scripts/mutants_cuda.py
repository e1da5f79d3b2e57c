# SPDX-License-Identifier: Apache-2.0
"""Mutants of the CUDA kernels, for scripts/mutate.py; killed by their execution on the CPU (tests/simt)."""

from mutants import Mutant

FILE = "tests/test_cuda.py"
LONG = (FILE, "-k", "long_lengths or space_on_tensor or class_row_weights or keys_of_weight or every_scheme_on")
ROW_TESTS = "tests/test_cuda_rows.py"
TILES = (ROW_TESTS, "-k", "16_queries or 32_queries or wide_heads or that_stream or many_groups")
KEPT = (ROW_TESTS, "-k", "many_groups or is_kept or are_kept or without_statistics or hard_inputs")
FINITE = (ROW_TESTS, "-k", "not_finite or weight_zero")
SHORT = (FILE, "-k", "short or not_finite or class_row_weights")
SHORT_MADE, BLOCKS = ("tests/test_cuda_short.py",), ("tests/test_cuda_generic.py",)
GUARDED = (FILE, "-k", "guard_arena")
PLAIN = (FILE, "-k", "generic_lengths or class_row_weights")
SHORT_CUH, SHORT_TILE, ROWS, RESIDENT, RESIDENT_BACKWARD, STREAMING, STREAMING_BACKWARD, GENERIC, CLASS_ROW, LAUNCH = (
    f"csrc/cuda/{name}"
    for name in (
        "short.cuh",
        "short_tile.cuh",
        "rows.cuh",
        "resident.cuh",
        "resident_backward.cuh",
        "streaming.cuh",
        "streaming_backward.cuh",
        "generic.cuh",
        "class_row.cuh",
        "launch.cu",
    )
)

MUTANTS = [
    # Rows in shared memory and in registers, 17 members and more
    Mutant(
        "CUDA: chunks of one row not turned against another's",
        ROWS,
        "cp_async16(to + place, row_of(head(x)",
        "cp_async16(to + row * D + 8 * chunk, row_of(head(x)",
        LONG,
    ),
    Mutant(
        "CUDA: keys that do not exist have scores",
        ROWS,
        "if (key + 8 * (i >> 2) + 2 * t + (i & 1) >= members)",
        "if (key + 8 * (i >> 2) + 2 * t + (i & 1) > members)",
        LONG,
    ),
    Mutant("CUDA: the class row is a query", ROWS, "return p.role == kKey; }", "return 0 * p.role; }", LONG),
    Mutant(
        "CUDA: words of a quad exchanged once",
        ROWS,
        "for (int far = 1; far <= 2; far *= 2)",
        "for (int far = 1; far < 2; far *= 2)",
        LONG,
    ),
    Mutant("CUDA: sums do not shrink", ROWS, "top[half] = now, total[half] *= shrink[half];", "top[half] = now;", LONG),
    Mutant("CUDA: outputs do not shrink", ROWS, "if (!__any_sync(~0u, shrinks)) return;", "return;", LONG),
    Mutant(
        "CUDA: outputs of the second tile do not shrink",
        ROWS,
        "shrinks |= !(shrink[i][0]",
        "shrinks = !(shrink[0][0]",
        TILES,
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
        "const bool first = part && member == 0,",
        "const bool first = part && member == 1,",
        LONG,
    ),
    # A block with a whole sequence
    Mutant(
        "CUDA: keys before they have landed",
        RESIDENT,
        "cp_async_wait_for(kResidentMembers / kResidentKeys - 1 - key / kResidentKeys);",
        "cp_async_wait_for(3);",
        TILES,
    ),
    Mutant("CUDA: keys of other threads before they have landed", RESIDENT, "      __syncthreads();\n", "", TILES),
    Mutant(
        "CUDA: both blocks of a sequence have the same queries",
        RESIDENT,
        "16 * TILES * (block.at.tile * block.warps + block.warp)",
        "16 * TILES * (0 * block.at.tile * block.warps + block.warp)",
        TILES,
    ),
    Mutant(
        "CUDA: share of a group missing, resident",
        RESIDENT_BACKWARD,
        "factor *= class_share(p, at.batch, at.group);",
        "factor *= 1.0f;",
        TILES,
    ),
    Mutant(
        "CUDA: triples before all warps have told theirs",
        RESIDENT_BACKWARD,
        "    __syncthreads();  // triples of this tile",
        "    // triples of this tile",
        TILES,
    ),
    Mutant(
        "CUDA: the last ds read before all warps have written theirs",
        RESIDENT_BACKWARD,
        "  __syncthreads();\n  finish(",
        "  finish(",
        TILES,
    ),
    Mutant(
        "CUDA: queries of the next tile before they have landed",
        RESIDENT_BACKWARD,
        "    cp_async_wait<0>();\n",
        "",
        TILES,
    ),
    Mutant(
        "CUDA: a tile overwritten while it is in use",
        RESIDENT_BACKWARD,
        "buffer == 0 ? kBuffers - 1 : buffer - 1",
        "buffer",
        TILES,
    ),
    Mutant(
        "CUDA: ds of two tiles in one place",
        RESIDENT_BACKWARD,
        "T* to = ds + turn * rows * kQueries;",
        "T* to = ds + (turn ^ 1) * rows * kQueries;",
        TILES,
    ),
    Mutant(
        "CUDA: triples of two tiles in one place",
        RESIDENT_BACKWARD,
        "const int told = turn * block.warps",
        "const int told = 0 * turn * block.warps",
        TILES,
    ),
    Mutant(
        "CUDA: sums of warps added as they are",
        RESIDENT_BACKWARD,
        "const float share = ex2(tops[from + w * kQueries] - top);",
        "const float share = 1;",
        TILES,
    ),
    Mutant(
        "CUDA: another warp's largest score taken for one's own",
        RESIDENT_BACKWARD,
        "float factor = ex2(tops[from + warp * kQueries] - top)",
        "float factor = ex2(tops[from] - top)",
        TILES,
    ),
    Mutant(
        "CUDA: only every second warp's sums",
        RESIDENT_BACKWARD,
        "      total += __shfl_xor_sync(~0u, total, 16);\n",
        "",
        TILES,
    ),
    Mutant(
        "CUDA: only every second warp's delta",
        RESIDENT_BACKWARD,
        "      dot += __shfl_xor_sync(~0u, dot, 16);\n",
        "",
        TILES,
    ),
    Mutant(
        "CUDA: a warp that has nothing but -inf",
        RESIDENT_BACKWARD,
        "const float zero = all == -INFINITY ? 0.0f : all;",
        "const float zero = all;",
        FINITE,
    ),
    Mutant(
        "CUDA: keys that do not exist have probabilities",
        RESIDENT_BACKWARD,
        "< p.members ? 0.0f : -INFINITY;  // a key",
        "<= p.members ? 0.0f : -INFINITY;  // a key",
        TILES,
    ),
    Mutant(
        "CUDA: ds transposed in shared memory",
        RESIDENT_BACKWARD,
        "16 * warp + g + 8 * (i & 1), 2 * j + (i >> 1)",
        "16 * warp + g + 8 * (i >> 1), 2 * j + (i & 1)",
        TILES,
    ),
    Mutant(
        "CUDA: a query that is none has a probability, resident",
        RESIDENT_BACKWARD,
        "if (all != ~0u && !(all >> column & 1)) e = d = 0;",
        "if (all != ~0u && !(all >> column & 1)) d = 0;",
        FINITE,
    ),
    Mutant(
        "CUDA: class row of dq without its part",
        RESIDENT_BACKWARD,
        "const bool part = p.role == kPerGroup && first == 0;",
        "const bool part = p.role == kPerGroup && first < 0;",
        TILES,
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
        STREAMING_BACKWARD,
        "p.role == kGlobal && at.group > 0 && row == 0",
        "p.role == kGlobal && at.group < 0 && row == 0",
        LONG,
    ),
    Mutant(
        "CUDA: parts of a global class row divided too early",
        ROWS,
        "global ? kept.y * reciprocal(total) : reciprocal(total)",
        "reciprocal(total)",
        LONG,
    ),
    Mutant(
        "CUDA: sum(p * dp) of the mean class row taken for a group's",
        STREAMING_BACKWARD,
        "if (p.role == kPerGroup && row == 0 && g == 0)",
        "if (p.role == kPerGroup && row < 0 && g == 0)",
        KEPT,
    ),
    Mutant(
        "CUDA: share of a group missing, streaming",
        STREAMING_BACKWARD,
        "factor[half] *= class_share(p, at.batch, at.group);",
        "factor[half] *= 1.0f;",
        KEPT,
    ),
    Mutant(
        "CUDA: sum(p * dp) of one half of the head",
        STREAMING_BACKWARD,
        "for (int i = 0; i < D / 4; ++i)",
        "for (int i = 0; i < D / 8; ++i)",
        TILES,
    ),
    Mutant(
        "CUDA: a query that is none has a probability, streaming",
        STREAMING_BACKWARD,
        "const bool edge = first + query == 0 || first",
        "const bool edge = first + query < 0 || first",
        FINITE,
    ),
    Mutant(
        "CUDA: numbers of queries that do not exist",
        STREAMING_BACKWARD,
        "none(query + i / 3) ? 0.0f : from[i / 3 * 4 + i % 3]",
        "from[i / 3 * 4 + i % 3]",
        TILES,
    ),
    Mutant(
        "CUDA: a group's own class output not kept", LAUNCH, "if (p->stats && outputs)", "if (p->stats && !outputs)", KEPT
    ),
    Mutant(
        "CUDA: a backward without statistics goes on",
        LAUNCH,
        "regime_of(p) == kStreaming && !(p.saved && p.out.data)",
        "regime_of(p) == kStreaming && !(p.saved || !p.out.data)",
        KEPT,
    ),
    # Short sequences, the plain kernel, the class row
    Mutant(
        "CUDA: off-diagonal blocks of a transpose not swapped",
        SHORT_TILE,
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
        SHORT_TILE,
        "n == i / 2 && g / MEMBERS == (2 * t + (i & 1)) / MEMBERS",
        "n == i / 2",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: the second half of a product lost",
        SHORT_TILE,
        "sums[r][2] = other[2], sums[r][3] = other[3];",
        "",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: the second half has no turn",
        SHORT_TILE,
        "row.sequence % (kHalf ? kHalf : 1)",
        "row.sequence + 0 * (kHalf ? kHalf : 1)",
        SHORT_MADE,
    ),
    Mutant(
        "CUDA: rows of the second half from the first group",
        SHORT_TILE,
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
        BLOCKS,
    ),
    Mutant(
        "CUDA: every tile from the first columns",
        GENERIC,
        "load16(row_of(head, x, from) + first + column)",
        "load16(row_of(head, x, from) + column)",
        BLOCKS,
    ),
    Mutant(
        "CUDA: columns past the end of a row",
        GENERIC,
        "member < count && first + column < D",
        "member < count",
        GUARDED,
    ),
    Mutant("CUDA: distance of tokens not looked at", GENERIC, "p.tokens == 1 || x.token % n == 0", "true", BLOCKS),
    Mutant("CUDA: alignment of dout not looked at", GENERIC, "!p.dq.data || reads_wide(p, p.dout)", "true", BLOCKS),
    Mutant(
        "CUDA: a score fused with what follows it, plain",
        GENERIC,
        "return times(products(k, p.k, query, first), p.scale); };",
        "return products(k, p.k, query, first) * p.scale; };",
        ("tests/test_cuda_generic.py", "-k", "same_number"),
    ),
    Mutant(
        "CUDA: sum(p * dp) of a global class row in another order, plain",
        GENERIC,
        "delta = lane == 0 ? dp : 0.0f;",
        "delta = lane == 0 ? dp * 1.0000001f : 0.0f;",
        ("tests/test_cuda_generic.py", "-k", "same_number"),
    ),
]
