# SPDX-License-Identifier: Apache-2.0
"""The mutants of the model: streams, folded products, what training keeps, sessions."""

from mutants import Mutant

BLOCK = ("tests/test_divided_attention.py",)
STREAM = ("tests/test_stream.py", "-k", "not triton")
STEPS = ("tests/test_stream.py", "-k", "fused_steps or parts")
FOLD = ("tests/test_folding.py",)
KEPT = ("tests/test_memory.py", "-k", "per_block or full_checkpoint or twice or autocast")
MODES = ("tests/test_memory.py", "-k", "all_modes and not triton")
PEAK = ("tests/test_memory.py", "-k", "peak")
SESSION = ("tests/test_session.py",)
PATHS = ("tests/test_paths.py", "tests/test_folding.py", "-k", "not triton")
SCALE = ("tests/test_compile.py", "-k", "scale_of")

MODULE, STREAM_PY, MLP, MODEL = (f"timesformer/{name}.py" for name in ("attention", "stream", "mlp", "model"))
FOLDING, RECOMPUTE, INFERENCE, LAYERS = (
    f"timesformer/{name}.py" for name in ("folding", "recompute", "inference", "layers")
)

MUTANTS = [
    # The module
    Mutant("time residual reaches the class row", STREAM_PY, "branch[:, 0].zero_()", "pass", BLOCK),
    Mutant("space attention where time should be", MODULE, 'step = "time", frames', 'step = "space", frames', BLOCK),
    Mutant("class row takes part in time attention", MODULE, 'mode = "exclude" if', 'mode = "key" if', BLOCK),
    Mutant(
        "drop path per frame without weights",
        MODULE,
        "frames, mode, self.backend, weights, class_row_only",
        "frames, mode, self.backend, None, class_row_only",
        BLOCK,
    ),
    # The stream
    Mutant(
        "fused sum forgets the factors",
        STREAM_PY,
        "branch is None or scale is None else",
        "True else",
        ("tests/test_stream.py", "-k", "by_the_rule and triton and joint and none"),
    ),
    Mutant(
        "fused time residual reaches the class row",
        STREAM_PY,
        "skip_cls=branch is not None and self.skip_cls",
        "skip_cls=False",
        ("tests/test_stream.py", "-k", "by_the_rule and triton and divided and none"),
    ),
    Mutant(
        "a branch is added twice",
        STREAM_PY,
        "            self.branch = None\n            self.x = residual",
        "            self.x = residual",
        STREAM,
    ),
    Mutant("steps never fused", LAYERS, 'return None if name == "reference" else name', "return None", STEPS),
    Mutant("a hooked block merges", MODEL, "plain(block, type(block))\n", "True\n", STREAM),
    Mutant(
        "global hooks overlooked",
        LAYERS,
        "not watched(layer) and not hooked_everywhere()",
        "not watched(layer)",
        STREAM,
    ),
    Mutant(
        "the last part of an MLP's rows is lost",
        MLP,
        "return torch.cat(out).view(*x.shape[:-1], -1)",
        "return torch.cat([*out[:-1], out[0][: len(out[-1])]]).view(*x.shape[:-1], -1)",
        STEPS,
    ),
    # Folded products
    Mutant(
        "folded the wrong way round",
        FOLDING,
        "return fc.weight @ proj.weight,",
        "return proj.weight @ fc.weight,",
        FOLD,
    ),
    Mutant(
        "dropped rows lose the bias of temporal_fc",
        MODULE,
        "torch.addcmul(fc.bias.to(branch.dtype), branch, scale)",
        "branch * scale",
        FOLD,
    ),
    Mutant("a fold under the eyes of a hook", MODULE, "            and plain(attn, Attention)\n", "", FOLD),
    Mutant("a fold that does not pay", MODULE, "x.shape[0] * x.shape[1] <= self.dim", "x.shape[0] < 0", FOLD),
    Mutant(
        "shift of LayerNorm lost",
        FOLDING,
        "F.linear(bias, wide.weight, wide.bias), layer.weight",
        "wide.bias, layer.weight",
        FOLD,
    ),
    Mutant(
        "scale of LayerNorm on the wrong side",
        FOLDING,
        "wide.weight * norm.weight.to(wide.weight.dtype)",
        "wide.weight * norm.weight.to(wide.weight.dtype).mean()",
        FOLD,
    ),
    Mutant("a changed weight goes unnoticed", FOLDING, "or version_of(p) != version:\n", ":\n", FOLD),
    Mutant("a moved weight goes unnoticed", FOLDING, "or p.data_ptr() != address ", "", FOLD),
    Mutant("the folded form trains", FOLDING, "torch.is_grad_enabled() or block.training or ", "", FOLD),
    Mutant("a hook after fuse is not called", FOLDING, "seen = seen or watched(m)", "pass", FOLD),
    Mutant("copies stay fused", MODEL, '{**self.__dict__, "_folded": None}', "self.__dict__", FOLD),
    Mutant("an adapter is folded", LAYERS, "type(layer) is kind and", "isinstance(layer, kind) and", FOLD),
    # What training keeps
    Mutant("LayerNorm's result is kept", MODULE, "linear(self.qkv, x, source)", "linear(self.qkv, x, None)", KEPT),
    Mutant("GELU's result is kept", MLP, "source and Source(F.gelu, (x,))", "None", KEPT),
    Mutant("patches are kept", "timesformer/patches.py", "Source(gather, (video,), sizes)", "None", KEPT),
    Mutant(
        "light keeps the attention output", MODULE, "branch = segment(light, run,", "branch = segment(False, run,", KEPT
    ),
    Mutant("light keeps the hidden activations", MODEL, 'if self.checkpoint == "light" and', "if False and", KEPT),
    Mutant("full is none", MODEL, '== "full" and torch', '== "fully" and torch', KEPT),
    Mutant(
        "other random numbers the second time", MODEL, "stream.sum(), random=True", "stream.sum(), random=False", MODES
    ),
    Mutant(
        "LayerNorm made anew with another epsilon",
        STREAM_PY,
        "weight, bias, eps)\n    return",
        "weight, bias, 1e-2)\n    return",
        STREAM,
    ),
    Mutant("bias gradient of half the rows", RECOMPUTE, "dbias = rows.sum(0)", "dbias = rows[::2].sum(0)", STREAM),
    Mutant(
        "weights in another dtype under autocast",
        RECOMPUTE,
        "dtype = torch.get_autocast_dtype(x.device.type)",
        "dtype = torch.float32",
        KEPT,
    ),
    # Host cost
    Mutant("host: fuse turns stochastic depth off", FOLDING, '{"drop_path": _with(block.drop_path)}', "{}", PATHS),
    Mutant("host: the folded form in training mode", FOLDING, "    twin.training = False\n", "", PATHS),
    Mutant(
        "host: compiled code asks for the number of rows", MLP, "torch.compiler.is_compiling() or rows", "rows", SCALE
    ),
    # Sessions
    Mutant("a session runs any shape", INFERENCE, " or tuple(video.shape) not in self.shapes", "", SESSION),
    Mutant("a session overlooks new weights", INFERENCE, "version_of(p) != version", "False", SESSION),
    Mutant(
        "a session converts the model itself",
        INFERENCE,
        "copy.deepcopy(model).to(self.dtype)",
        "model.to(self.dtype)",
        SESSION,
    ),
    Mutant("16-bit products on any CPU", INFERENCE, "torch.float32 if slow else self.dtype", "self.dtype", SESSION),
    Mutant(
        "a session fuses the user's model", INFERENCE, "self._model = copy.copy(model)", "self._model = model", SESSION
    ),
]
