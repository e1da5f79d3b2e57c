# SPDX-License-Identifier: Apache-2.0
"""Mutants of the Triton kernels and of their host code, for scripts/mutate.py; killed in Triton's interpreter."""

from mutants import PACKAGE, Mutant

FILE = "tests/test_triton_attention.py"
LENGTHS = (FILE, "-k", "length_bucket or class_mode")
CLASS_ROW = (FILE, "-k", "class_mode or class_weights or more_groups")
FINITE = (FILE, "-k", "finite or infinity or length_bucket")
AXES = (FILE, "-k", "several_axes")
HEAD_DIMS = (FILE, "-k", "head_dims or length_bucket")
MEMORY = (FILE, "-k", "alignment or 32_bits or gradients_of or keeps")
LAUNCH = ("tests/test_triton_launch.py",)
PLANS = (FILE, "-k", "keeps or tile or table or launch_dimension or tf32 or widened or dtype")

DEVICE, RESIDENT, STREAMING, CLASS_PY, HOST, REGIMES = (
    f"kernels/timesformer_kernels/backends/triton/{name}.py"
    for name in ("device", "resident", "streaming", "class_row", "attention", "regimes")
)

MUTANTS = [
    # Where a token lies
    Mutant(
        "Triton: class row taken for a patch",
        DEVICE,
        "tl.where(place == 0, 0, row + walk(place - 1,",
        "tl.where(place == 0, 1, row + walk(place - 1,",
        LENGTHS,
    ),
    Mutant(
        "Triton: patches one place off behind the class row",
        DEVICE,
        "row + walk(place - 1,",
        "row + walk(place,",
        LENGTHS,
    ),
    Mutant(
        "Triton: second axis of a walk",
        DEVICE,
        "return index // n1 * step0 + index % n1 * step1\n",
        "return index // n1 * step1 + index % n1 * step0\n",
        AXES,
    ),
    Mutant(
        "Triton: third axis of a walk",
        DEVICE,
        "outer % n1 * step1 + index % n2 * step2",
        "outer % n2 * step1 + index % n2 * step2",
        AXES,
    ),
    Mutant("Triton: offsets always in 32 bits", DEVICE, "    if P.WIDE:\n", "    if False:\n", MEMORY),
    Mutant(
        "Triton: stride of keys used for values",
        RESIDENT,
        "    v = load_blocks(v_ptr, vs, tile, where, part, P)\n    fine = True\n    for m0",
        "    v = load_blocks(v_ptr, ks, tile, where, part, P)\n    fine = True\n    for m0",
        MEMORY,
    ),
    Mutant(
        "Triton: columns past the head dimension kept",
        DEVICE,
        "x = tl.load(at, mask=keep[:, None] & (d < P.D)[None, :], other=0.0)",
        "x = tl.load(at, mask=keep[:, None] & (d < P.D + 1)[None, :], other=0.0)",
        HEAD_DIMS,
    ),
    # Masks
    Mutant(
        "Triton: keys that do not exist are seen",
        RESIDENT,
        "    elif start + SIZE > P.M:\n        x =",
        "    elif start + SIZE > P.M + 16:\n        x =",
        LENGTHS,
    ),
    Mutant(
        "Triton: packed sequences see one another",
        RESIDENT,
        "        x = tl.where(same, x, other)",
        "        x = x",
        LENGTHS,
    ),
    Mutant(
        "Triton: tail of a streamed sequence unmasked",
        STREAMING,
        "            s = tl.where(exists[None, :], s, -INFINITY)",
        "            s = s",
        LENGTHS,
    ),
    Mutant(
        "Triton: tail unmasked in the gradient of the queries",
        STREAMING,
        "            p = tl.where(exists[None, :], p, 0.0)",
        "            p = p",
        (FILE, "-k", "hostile or infinity or streaming"),
    ),
    Mutant(
        "Triton: class key counted once in every group",
        RESIDENT,
        "    if P.CLS == 3:  # the one softmax of the class row counts the class key once\n        x",
        "    if P.CLS == 4:\n        x",
        CLASS_ROW,
    ),
    Mutant(
        "Triton: class key counted once in every group, streaming",
        STREAMING,
        "    if P.CLS == 3:\n        x = tl.where((place == 0) & (key == 0) & (group > 0), other, x)",
        "    if P.CLS == 4:\n        x = x",
        CLASS_ROW,
    ),
    Mutant(
        "Triton: last tile of a packed batch unmasked",
        RESIDENT,
        "(own < P.PACK) & (group < where[0])",
        "(own < P.PACK) & (group <= where[0])",
        LENGTHS,
    ),
    # Not finite
    Mutant(
        "Triton: forward never done again by sequence",
        RESIDENT,
        "            fine = finite(acc)",
        "            fine = True",
        FINITE,
    ),
    Mutant(
        "Triton: backward never done again by sequence",
        RESIDENT,
        "                fine = finite(dq + dk_now + dv_now)",
        "                fine = True",
        FINITE,
    ),
    Mutant(
        "Triton: -inf so far makes NaN",
        STREAMING,
        "base = tl.where(higher > -INFINITY, higher, 0.0)",
        "base = higher",
        FINITE,
    ),
    # Softmax and gradients
    Mutant(
        "Triton: rescaling of the running sum",
        STREAMING,
        "total = total * kept + tl.sum(e, 1)",
        "total = total + tl.sum(e, 1)",
        LENGTHS,
    ),
    Mutant(
        "Triton: rescaling of the running output",
        STREAMING,
        "acc = acc * kept[:, None] + product(e, v, P)",
        "acc = acc + product(e, v, P)",
        LENGTHS,
    ),
    Mutant(
        "Triton: scale missing in the scores",
        RESIDENT,
        "        s = scaled(inner(q, k[i], P), scale, P)\n        s = hide",
        "        s = scaled(inner(q, k[i], P), 1.0, P)\n        s = hide",
        LENGTHS,
    ),
    Mutant(
        "Triton: scale missing in ds",
        RESIDENT,
        "ds = p[i] * (dp[i] - delta[:, None]) * scale",
        "ds = p[i] * (dp[i] - delta[:, None])",
        LENGTHS,
    ),
    Mutant(
        "Triton: delta missing where sums are saved",
        RESIDENT,
        "ds = p * (inner(do, v[i], P) - delta[:, None]) * scale",
        "ds = p * inner(do, v[i], P) * scale",
        LENGTHS,
    ),
    Mutant(
        "Triton: delta missing in dk of a streamed sequence",
        STREAMING,
        "(inner(v, do, P) - delta[None, :])",
        "inner(v, do, P)",
        LENGTHS,
    ),
    Mutant(
        "Triton: saved maximum of another row",
        RESIDENT,
        "store_sums(sums_ptr, index, top, total, exists)",
        "store_sums(sums_ptr, index, top * 0 + tl.max(top, 0), total, exists)",
        LENGTHS,
    ),
    # The class row
    Mutant(
        "Triton: groups of the class row summed, not averaged", CLASS_PY, "None, P) / groups", "None, P)", CLASS_ROW
    ),
    Mutant(
        "Triton: class weights ignored in the backward",
        DEVICE,
        "        return tl.load(weights_ptr + batch * groups + group)",
        "        return 1.0 / groups + 0.0 * group",
        CLASS_ROW,
    ),
    Mutant(
        "Triton: class row's own delta missing",
        STREAMING,
        "        delta = tl.where(place == 0, own, delta)",
        "        delta = delta * 1.0",
        CLASS_ROW,
    ),
    Mutant(
        "Triton: only sixteen groups of the class row",
        CLASS_PY,
        "    acc = tl.zeros([GROUPS, BLOCK_D], tl.float32)\n    for g0 in range(0, groups, GROUPS):",
        "    acc = tl.zeros([GROUPS, BLOCK_D], tl.float32)\n    for g0 in range(0, GROUPS, GROUPS):",
        CLASS_ROW,
    ),
    Mutant(
        "Triton: row 0 not zeroed",
        RESIDENT,
        "        if tile == 0:\n            store_zero_row(o_ptr, P)",
        "        if tile == 1:\n            store_zero_row(o_ptr, P)",
        LENGTHS,
    ),
    Mutant(
        "Triton: class gradient of dk and dv swapped",
        CLASS_PY,
        "row = add_parts(cls_ptr, first + 1,",
        "row = add_parts(cls_ptr, first + 2,",
        CLASS_ROW,
    ),
    # Host
    Mutant("Triton: alignment taken for granted", HOST, "return vec if layout.aligned and", "return vec if", MEMORY),
    Mutant(
        "Triton: one layout taken for all three gradients",
        HOST,
        "    if not dq.stride() == dk.stride() == dv.stride():",
        "    if False:",
        MEMORY,
    ),
    Mutant(
        "Triton: output kept where nothing needs it",
        REGIMES,
        'saves = not resident("alone", M, dtype.itemsize, D)',
        "saves = True",
        PLANS,
    ),
    Mutant(
        "Triton: tiles of the last groups missing",
        HOST,
        "tiles = -(-G // plan.PACK)",
        "tiles = max(1, G // plan.PACK)",
        LENGTHS,
    ),
    Mutant(
        "Triton: tiles of the last queries missing",
        HOST,
        "tiles = -(-owned[0] // owned[1])",
        "tiles = owned[0] // owned[1]",
        LENGTHS,
    ),
    Mutant(
        "Triton: bfloat16 not widened in the interpreter",
        HOST,
        "UPCAST=INTERPRETED and layout.dtype == torch.bfloat16",
        "UPCAST=False",
        PLANS,
    ),
    Mutant(
        "Triton: 197 rows padded to 256",
        REGIMES,
        "smaller += size < largest",
        "smaller += 2 * (size < largest)",
        (FILE, "-k", "padded or waste"),
    ),
    Mutant(
        "host: a launch's binary serves any alignment",
        f"{PACKAGE}/backends/triton/launch.py",
        "(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor)",
        "(x.dtype,) if isinstance(x, torch.Tensor)",
        LAUNCH,
    ),
    Mutant(
        "host: a launch's binary serves any number",
        f"{PACKAGE}/backends/triton/launch.py",
        "else (type(x), x))",
        "else type(x))",
        LAUNCH,
    ),
]
