# SPDX-License-Identifier: Apache-2.0
"""Mutants of folded blocks in place: the biases in the C++ kernels, and who owns which memory."""

from mutants import TILE_ATTENTION, Mutant

QUERIES = ("tests/test_inplace.py", "-k", "query_bias")
STEP = ("tests/test_inplace.py", "-k", "branch_bias or over_operands")
BLOCKS = ("tests/test_inplace.py", "-k", "logits or parts or hold or written or memory or backend or serve")
CALL, SHORT, FORWARD, STEPS = (f"csrc/cpu/{name}" for name in ("call.h", "short.h", "forward.h", "steps.cpp"))
ROW = ("tests/test_class_row.py",)
CLASS_ROW, MODULE = "timesformer/class_row.py", "timesformer/attention.py"
INPLACE, STREAM, FOLDING = (f"timesformer/{name}.py" for name in ("inplace", "stream", "folding"))

MUTANTS = [
    # The kernels
    Mutant(
        "q_bias: not for short sequences",
        SHORT,
        "matrix(a.q, packed[0], c.q_bias(h))",
        "matrix(a.q, packed[0])",
        QUERIES,
    ),
    Mutant("q_bias: read in place all the same", SHORT, "D % kWidth<C> == 0 && !bias", "D % kWidth<C> == 0", QUERIES),
    Mutant(
        "q_bias: not for long sequences",
        FORWARD,
        "q_rows(i0 + i), c.D, c.scale, c.q_bias(h))",
        "q_rows(i0 + i), c.D, c.scale)",
        QUERIES,
    ),
    Mutant(
        "q_bias: not for the global class row",
        FORWARD,
        "b, h, 0), c.D, c.scale, c.q_bias(h))",
        "b, h, 0), c.D, c.scale)",
        QUERIES,
    ),
    Mutant("q_bias: of the first head", CALL, "(a.q_bias) + h * D", "(a.q_bias) + 0 * D", QUERIES),
    Mutant(
        "q_bias: not scaled",
        CALL,
        "(load_some<T>(x + d, D - d) + load_some<T>(bias + d, D - d)) * factor",
        "load_some<T>(x + d, D - d) * factor + load_some<T>(bias + d, D - d)",
        QUERIES,
    ),
    Mutant(
        "q_bias: a backward ignores it", "csrc/cpu/dispatch.cpp", "backward && a->q_bias", "false && a->q_bias", QUERIES
    ),
    Mutant(
        "q_bias: not on matrix units", TILE_ATTENTION, "add_bias(q, t.depth_dim, n, c.q_bias(h), c.D);", "", QUERIES
    ),
    Mutant(
        "branch_bias: forgotten",
        STEPS,
        "how.load(branch + i) + how.load(branch_bias + i)",
        "how.load(branch + i)",
        STEP,
    ),
    Mutant(
        "branch_bias: read as scale and shift are",
        STEPS,
        "widen<T>(job, c.branch_bias, c.dtype, ",
        "widen<T>(job, c.branch_bias, c.bias_dtype, ",
        STEP,
    ),
    # The blocks
    Mutant("in place: the query's bias lost", INPLACE, "q_bias=step.q_bias", "q_bias=None", BLOCKS),
    Mutant(
        "in place: the value's bias lost",
        INPLACE,
        "F.linear(v_bias.reshape(dim).to(wide)",
        "F.linear(0 * v_bias.reshape(dim).to(wide)",
        BLOCKS,
    ),
    Mutant("in place: proj's bias lost", INPLACE, "None if bias is None else bias.to(wide)", "None", BLOCKS),
    Mutant("in place: fc2's bias lost", INPLACE, "bias=self.fc2_bias", "bias=None", BLOCKS),
    Mutant(
        "in place: the class row takes time's residual",
        INPLACE,
        'skip_cls=step.cls == "exclude"',
        "skip_cls=False",
        BLOCKS,
    ),
    Mutant(
        "in place: the default scale", INPLACE, "shown, step.scale, None", "shown, q.shape[3] ** -0.5, None", BLOCKS
    ),
    Mutant(
        "in place: parts larger than the memory",
        INPLACE,
        "parts, steps = max(1, -(-len(rows) // memory.most))",
        "parts, steps = max(1, len(rows) // memory.most // 2)",
        BLOCKS,
    ),
    Mutant(
        "in place: all hidden activations at once",
        INPLACE,
        "rows if rows <= ROWS else max(ROWS, rows * 3 * dim // hidden)",
        "rows",
        BLOCKS,
    ),
    Mutant("in place: no memory kept", INPLACE, "if stream.memory is None:", "if True:", BLOCKS),
    Mutant("in place: under autocast, too", INPLACE, 'and not torch.is_autocast_enabled("cpu")', "", BLOCKS),
    Mutant("in place: operators nobody sees", INPLACE, "and not needs_op(x)", "", BLOCKS),
    Mutant("in place: on every backend", INPLACE, 'steps_of(x, backend) == "cpp"', "True", BLOCKS),
    Mutant("stream: a pending bias lost", STREAM, "self.branch.add_(self.bias)", "pass", BLOCKS),
    Mutant(
        "stream: what it gave away is written", STREAM, "        self.memory = None\n        if", "        if", BLOCKS
    ),
    Mutant("fuse: the backend of that time", FOLDING, "self._form.backend = block.backend", "pass", BLOCKS),
    # The class row alone
    Mutant(
        "class row: groups and places swapped",
        CLASS_ROW,
        "unflatten(1, (-1, groups))",
        "unflatten(1, (groups, -1)).mT.mT.transpose(1, 2)",
        ROW,
    ),
    Mutant("class row: counted once", CLASS_ROW, "p[:, :1].sum(2)", "p[:, :1].mean(2)", ROW),
    Mutant(
        "class row: no key of a group",
        CLASS_ROW,
        "own.expand(-1, 1, groups, -1)",
        "own.expand(-1, 1, groups, -1) - 1e9",
        ROW,
    ),
    Mutant("class row: the mean for a weighted sum", CLASS_ROW, "if cls_weights is None else", "if True else", ROW),
    Mutant("class row: the query's bias lost", CLASS_ROW, "if q_bias is not None", "if False", ROW),
    Mutant("class row: the value's bias lost", CLASS_ROW, "if v_bias is not None", "if False", ROW),
    Mutant("class row: the value's bias unweighted", CLASS_ROW, "* shares.sum(1, keepdim=True)", "", ROW),
    Mutant("class row: scores in 16 bits", CLASS_ROW, "torch.promote_types(z.dtype, torch.float32)", "z.dtype", ROW),
    Mutant(
        "class row: under a hook", MODULE, 'backend != "reference" and plain(self.qkv)', 'backend != "reference"', ROW
    ),
    Mutant(
        "class row: under autocast",
        MODULE,
        'x.device.type != "cpu" or torch.is_autocast_enabled("cpu")',
        'x.device.type != "cpu"',
        ROW,
    ),
    Mutant("class row: on the reference", MODULE, 'backend != "reference" and plain(self.qkv)', "plain(self.qkv)", ROW),
    Mutant(
        "class row: joint attention by frames",
        MODULE,
        'groups=frames if scheme == "space" else 1',
        "groups=frames",
        ("tests/test_model.py",),
    ),
]
