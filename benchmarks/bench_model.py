# SPDX-License-Identifier: Apache-2.0
"""TimeSformer-B, float32, one clip: ours, Hugging Face's eager model with the same weights, and the products alone.

"products" runs every Linear of the model and the patch projection, nothing else, on random rows: what no attention
kernel can save. Its shapes are those of our unfused model, with D = 768 and S = 1 + N*T = 1569:

    patch projection           [S, 768] x [768, D]
    12 blocks: qkv of time     [S, D] x [D, 3D]      proj  [S, D] x [D, D]      temporal_fc  [S, D] x [D, D]
               qkv of space    [S, D] x [D, 3D]      proj  [S, D] x [D, D]
               fc1             [S, D] x [D, 4D]      fc2   [S, 4D] x [4D, D]
    head                       [1, D] x [D, 400]

Ours needs fewer: without gradients it folds proj and temporal_fc of time into one product, and the last block passes
only the class row on. A ratio below 1 is therefore possible.
"""

import copy
import json
from types import SimpleNamespace

import blocks
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import timesformer_kernels.flops  # noqa: F401  before any FlopCounterMode
from timesformer import TimeSformer
from timesformer.weights import to_native
from timesformer_kernels import registry

transformers = pytest.importorskip("transformers")

ROWS = ("ours", "ours-reference", "huggingface", "products")
BASE = dict(img_size=224, patch_size=16, num_classes=400, num_frames=8, embed_dim=768, depth=12, num_heads=12)
TINY = dict(img_size=32, patch_size=8, num_classes=5, num_frames=4, embed_dim=32, depth=2, num_heads=4)
ATEN_PRODUCTS = ("addmm", "mm", "linear")


def hugging_face(config):
    """Stock eager TimeSformer with every parameter random."""
    theirs = transformers.TimesformerForVideoClassification(
        transformers.TimesformerConfig(
            image_size=config["img_size"],
            patch_size=config["patch_size"],
            num_frames=config["num_frames"],
            hidden_size=config["embed_dim"],
            num_hidden_layers=config["depth"],
            num_attention_heads=config["num_heads"],
            intermediate_size=4 * config["embed_dim"],
            num_labels=config["num_classes"],
        )
    )
    return blocks.randomise(theirs, torch.Generator().manual_seed(0)).eval()


def ours(config, state, backend):
    """Our model around the tensors of `state`: two backends share one set of weights."""
    with torch.device("meta"):
        model = TimeSformer(**config, backend=backend)
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def bench(request):
    """Models, video, and the yardsticks of the checks."""
    tiny = request.config.getoption("--tiny", False)
    config = TINY if tiny else BASE
    theirs = hugging_face(config)
    state = {name: p.clone() for name, p in to_native(theirs.state_dict(), "huggingface").items()}
    models = {"ours": ours(config, state, "auto"), "ours-reference": ours(config, state, "reference")}
    size, frames = config["img_size"], config["num_frames"]
    video = torch.randn(1, 3, frames, size, size, generator=torch.Generator().manual_seed(1))
    locations = (size // config["patch_size"]) ** 2
    with torch.no_grad():
        logits = theirs(video.transpose(1, 2)).logits
        exact = copy.deepcopy(theirs).double()(video.double().transpose(1, 2)).logits
    return SimpleNamespace(
        models={**models, "huggingface": theirs},
        video=video,
        stacked=video.transpose(1, 2).contiguous(),  # [B, T, C, H, W], Hugging Face's order
        rows=1 + locations * frames,
        name="tiny" if tiny else "TimeSformer-B",
        shape=f"{'tiny' if tiny else f'{frames}x{size}'}: B=1, N={locations}, T={frames}",
        exact=exact,
        yardstick=logits,
    )


def forward(bench, row):
    """() -> logits"""
    if row == "huggingface":
        return lambda: bench.models[row](bench.stacked).logits
    return lambda: bench.models[row](bench.video)


def products(bench):
    """() -> None; every Linear of Hugging Face's model with its own weights, as many bytes of them as in a forward."""
    theirs, generator = bench.models["huggingface"], torch.Generator().manual_seed(2)
    layers = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    patch = theirs.timesformer.embeddings.patch_embeddings.projection.weight.flatten(1)  # [D, C * P * P]
    inputs = {n: torch.randn(1, bench.rows, n, generator=generator) for n in {m.in_features for m in layers}}
    pixels = torch.randn(1, bench.rows, patch.shape[1], generator=generator)
    calls = [(m, inputs[m.in_features][:, :1] if m is theirs.classifier else inputs[m.in_features]) for m in layers]

    def run():
        F.linear(pixels, patch)
        for layer, x in calls:
            layer(x)

    return run


def product_flops(call):
    """FLOP of the matrix products in one call, those of attention left out."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if op.__name__.split(".")[0] in ATEN_PRODUCTS)


def check_products(bench):
    """The list of products is complete: as many FLOP as our model's, with hooks that keep it from folding any."""
    model = bench.models["ours"]
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        expected = product_flops(forward(bench, "ours"))
    finally:
        for hook in hooks:
            hook.remove()
    got = product_flops(products(bench))
    assert got == expected, f"products: {got} FLOP, the unfused model has {expected}"
    return got


def peak_bytes(call, folder):
    """The most bytes that torch's allocator holds at once during a call that has run before, beyond what it held then.

    From the trace of the profiler, not from the resident set: ru_maxrss never falls, so that the building of the model
    hides a forward, and pages that malloc keeps for reuse look free or taken as history has it. The trace repeats
    to the byte, includes the workspaces of our kernels (they are tensors), and on both sides leaves out what MKL and
    oneDNN take inside a product.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):  # stable: events of one instant stay in their order
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert peak > 0, "the profiler recorded no allocation"
    return peak


def skip_without_kernels(row):
    """Skips our row, with the backend's reason, where it would run on the reference unnoticed."""
    if row == "ours" and (reason := registry.get("cpp").why_not("cpu", torch.float32, 64)):
        pytest.skip(f"ours: {reason}")


@pytest.mark.parametrize("row", ROWS)
def test_forward(compare, benchmark, bench, tmp_path, row):
    skip_without_kernels(row)
    info = dict(kind="model", op=bench.name, shape=bench.shape, direction="forward")
    with torch.no_grad():
        if row == "products":
            info |= dict(flops=check_products(bench), max_err=0.0, peak_bytes=None)
        else:
            logits = forward(bench, row)()
            oracle.assert_no_worse(f"logits of {row}", logits, bench.exact, bench.yardstick)
            info["max_err"] = (logits.double() - bench.exact).abs().max().item()
            info["flops"] = product_flops(forward(bench, row))
            if not benchmark.disabled:
                info["peak_bytes"] = peak_bytes(forward(bench, row), tmp_path)
    medians = compare(
        row,
        lambda: {name: products(bench) if name == "products" else forward(bench, name) for name in ROWS},
        dtype=torch.float32,
        group=f"{bench.name} {bench.shape.split(':')[0]} float32 forward",
        grad=False,
        seconds=60.0,
        warmup=1,
        table_seconds=0,  # a single round: the interleaved ones come first and warm it up
        info=info,
    )
    if medians:
        benchmark.extra_info["ratio_to_products"] = medians[row] / medians["products"]


def train_step(bench, row):
    """() -> gradients of all parameters, by our names."""
    model = bench.models[row]
    names, parameters = zip(*model.named_parameters(), strict=True)
    call = forward(bench, row)

    def run():
        return dict(zip(names, torch.autograd.grad(call().sum(), parameters), strict=True))

    return run if row != "huggingface" else lambda: to_native(run(), "huggingface")


@pytest.mark.parametrize("row", ["ours", "huggingface"])
def test_train_step(request, compare, benchmark, bench, tmp_path, row):
    """Forward and backward, no optimiser. The gradients are compared as one vector with those of float64."""
    skip_without_kernels(row)
    if not (request.config.getoption("--full", False) or request.config.getoption("--tiny", False)):
        pytest.skip("train step: runs with --full")
    exact, yardstick = gradients(bench)
    got = vector(train_step(bench, row)())
    oracle.assert_no_worse(f"gradients of {row}", got, exact, yardstick)
    info = dict(kind="model", op=bench.name, shape=bench.shape, direction="forward+backward")
    info["max_err"] = (got.double() - exact).abs().max().item()
    if not benchmark.disabled:
        info["peak_bytes"] = peak_bytes(train_step(bench, row), tmp_path)
    compare(
        row,
        lambda: {name: train_step(bench, name) for name in ("ours", "huggingface")},
        dtype=torch.float32,
        group=f"{bench.name} {bench.shape.split(':')[0]} float32 forward+backward",
        grad=True,
        seconds=120.0,
        warmup=1,
        table_seconds=0,
        info=info,
    )


def vector(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def gradients(bench):
    """(float64, float32) gradients of Hugging Face's model, once per module."""
    if not hasattr(bench, "gradients"):
        theirs = bench.models["huggingface"]
        double = SimpleNamespace(
            models={"huggingface": copy.deepcopy(theirs).double()}, stacked=bench.stacked.double(), video=None
        )
        steps = train_step(double, "huggingface"), train_step(bench, "huggingface")
        bench.gradients = tuple(vector(step()) for step in steps)
    return bench.gradients
