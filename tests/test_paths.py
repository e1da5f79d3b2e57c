# SPDX-License-Identifier: Apache-2.0
"""Every way through the model - plain, fused, checkpointed, compiled, in a Session - gives the same numbers, and takes
the kernels: whatever falls back to the reference is caught."""

import dataclasses

import blocks
import pytest
import torch
from blocks import TINY, clip
from oracle import device_of
from torch._dynamo.testing import CompileCounterWithBackend

from timesformer import TimeSformer
from timesformer.inference import Session
from timesformer_kernels import fused as steps
from timesformer_kernels import registry
from timesformer_kernels.backends import reference, reference_steps
from timesformer_kernels.native import library

DEPTH, SHAPE = TINY["depth"], (2, 3, 4, 32, 32)


pytestmark = pytest.mark.usefixtures("traceable")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(generator, dtype, name="auto", **options):
    return blocks.randomise(TimeSformer(**{**TINY, **options}, backend=name).to(dtype), generator)


def compiled(model, mode=None):
    return torch.compile(model, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))


# --- the kernels are reached -----------------------------------------------------------------------------------------


@pytest.fixture
def reached(fused, monkeypatch):
    """(name of a backend that runs here, {what: calls that it served}); the reference is out of bounds."""
    if fused not in steps._LOADERS or steps.why_not(fused, device_of(fused), torch.float32, 32):
        pytest.skip(f"{fused}: no fused steps")
    calls, backend, own = {}, registry.get(fused), steps._LOADERS[fused]()

    def counted(name, call):
        def run(*args, **options):
            calls[name] = calls.get(name, 0) + 1
            return call(*args, **options)

        return run

    def forbidden(*_, **__):
        raise AssertionError("the reference served a step")

    both = {name: counted(name, getattr(backend, name)) for name in ("forward", "backward")}
    monkeypatch.setitem(registry._BACKENDS, fused, dataclasses.replace(backend, **both))
    every = steps.Steps(*(counted(name, getattr(own, name)) for name in steps.Steps._fields))
    monkeypatch.setitem(steps._LOADERS, fused, lambda: every)
    for name in ("attend", "forward", "backward"):
        monkeypatch.setattr(reference, name, forbidden)
    for name in steps.Steps._fields:
        monkeypatch.setattr(reference_steps, name, forbidden)
    monkeypatch.setattr(steps, "REFERENCE", steps.Steps(*[forbidden] * len(steps.Steps._fields)))
    registry.resolve.cache_clear(), steps.resolve.cache_clear()
    yield fused, calls
    registry.resolve.cache_clear(), steps.resolve.cache_clear()


ATTENTION = {"forward": 2 * DEPTH}
STEPS = {"add_layer_norm_fwd": 3 * DEPTH, "bias_gelu_fwd": DEPTH}


def less(device):
    """Calls that are not needed on a CPU: in the last block, space attention has one query and asks for no keys."""
    return {"forward": int(device == "cpu")}


INFERENCE = {
    "plain": (lambda model, video: model(video), ATTENTION | STEPS),
    "fused": (lambda model, video: model.fuse()(video), ATTENTION | STEPS),
    "autocast": (lambda model, video: under_autocast(model, video), ATTENTION | STEPS),
    "compiled": (lambda model, video: compiled(model)(video), ATTENTION),  # the compiler fuses the other steps itself
    "session": (  # its warm-up counts, too
        lambda model, video: Session(model, [video.shape])(video),
        {name: 2 * n for name, n in (ATTENTION | STEPS).items()},
    ),
}


def under_autocast(model, video):
    with torch.autocast(video.device.type, dtype=torch.bfloat16):
        return model(video)


@pytest.mark.parametrize("way", INFERENCE)
def test_inference_takes_the_kernels(reached, generator, way):
    (name, calls), (run, expected) = reached, INFERENCE[way]
    device = device_of(name)
    if device == "cuda" and way == "session":
        pytest.skip("a graph's warm-up and capture count otherwise")
    model = make(generator, torch.float32, name, num_frames=2).eval().to(device)
    with torch.no_grad():
        assert run(model, clip(generator, 1, 2, 16, 16, torch.float32).to(device)).isfinite().all()
    runs = {"session": 2, "autocast": 0}.get(way, 1)  # autocast has the kernel for all queries
    served = {what: n + runs * less(device).get(what, 0) for what, n in calls.items() if what in expected}
    assert served == expected and not any("bwd" in what or what == "backward" for what in calls)


# Forward steps as often as in inference, and those again that are made anew: LayerNorm and GELU always, attention too
# by "light" and "full".
TRAINING = {
    "none": ({"forward": 1, "add_layer_norm_fwd": 2, "bias_gelu_fwd": 2}),
    "light": ({"forward": 2, "add_layer_norm_fwd": 2, "bias_gelu_fwd": 2}),
    "full": ({"forward": 2, "add_layer_norm_fwd": 2, "bias_gelu_fwd": 2}),
}


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("mode", TRAINING)
def test_training_takes_the_kernels(reached, generator, mode, drop_path):
    name, calls = reached
    device = device_of(name)
    options = dict(num_frames=2, checkpoint=mode, drop_path_rate=drop_path)
    model = make(generator, torch.float32, name, **options).train().to(device)
    model(clip(generator, 1, 2, 16, 16, torch.float32).to(device)).sum().backward()
    forward = {what: (n - less(device).get(what, 0)) * TRAINING[mode][what] for what, n in (ATTENTION | STEPS).items()}
    if mode != "full":  # what that query reads is kept
        forward["add_layer_norm_fwd"] -= less(device)["forward"]
    backward = {"backward": forward["forward"] // TRAINING[mode]["forward"]}
    backward |= {"add_layer_norm_bwd": 3 * DEPTH, "bias_gelu_bwd": DEPTH}
    assert calls == forward | backward


def test_the_trap_shuts(reached, generator):
    """What these tests rely on: a model on the reference does not get through."""
    model = make(generator, torch.float32, "reference", num_frames=2).eval()
    with pytest.raises(AssertionError, match="the reference served a step"), torch.no_grad():
        model(clip(generator, 1, 2, 16, 16, torch.float32))


# --- and they agree --------------------------------------------------------------------------------------------------


def masks(model, batch, frames):
    """Fixed factors of stochastic depth for every block, of every shape that it draws: half of the rows dropped."""
    gen = torch.Generator().manual_seed(4)
    for block in model.blocks:
        fixed = {(batch, *s): 2.0 * (torch.rand(batch, *s, generator=gen) > 0.5) for s in ((16, 1), (frames,), (1, 1))}
        block.drop_path.rate = 0.5
        block.drop_path.draw = lambda *shape, like, fixed=fixed: fixed[tuple(shape)].to(like.dtype)


def gradients(run, model, video):
    """{name: tensor}: logits, and the gradients of the video and of every parameter."""
    video = video.clone().requires_grad_()
    out = run(video)
    grads = torch.autograd.grad(out.square().sum(), [video, *model.parameters()])
    return dict(zip(["logits", "video", *dict(model.named_parameters())], [out.detach(), *grads], strict=True))


@pytest.mark.parametrize("drop_path", [False, True], ids=["all-rows", "fixed-masks"])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_training_agrees(generator, need, name, drop_path):
    """float64, against the reference in plain eager mode: all checkpoints, each of them compiled as well, and a model
    between `fuse` and `unfuse`. Nothing but the order of sums differs."""
    need(name, torch.float64)
    model, video = make(generator, torch.float64, "reference", drop_path_rate=0.0).train(), clip(generator)
    if drop_path:
        masks(model, *SHAPE[::2][:2])
    exact = gradients(model, model, video)
    model.set_backend(name)
    ways = {}
    for mode in TRAINING:
        model.set_checkpoint(mode)
        ways[mode] = gradients(model, model, video)
        torch.compiler.reset()
        ways[f"{mode} compiled"] = gradients(compiled(model), model, video)
    model.set_checkpoint("none")
    model.fuse()
    ways["fused"] = gradients(model, model, video)
    for way, got in ways.items():
        for what, value in exact.items():
            peak = value.abs().max().item()
            error = (got[what] - value).abs().max().item()
            assert error <= 1e-11 * peak + 1e-13, f"{way}: {what} is off by {error:.1e}, largest {peak:.1e}"


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_inference_agrees(generator, need, name):
    need(name, torch.float64)
    model, video = make(generator, torch.float64, "reference").eval(), clip(generator)
    with torch.no_grad():
        exact = model(video)
        model.set_backend(name)
        session = Session(model, [SHAPE])
        ways = dict(plain=model(video), session=session(video), compiled=compiled(model)(video))
        ways |= dict(fused=model.fuse()(video), fused_compiled=compiled(model)(video), unfused=model.unfuse()(video))
    for way, got in ways.items():
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")


# --- after a failure -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(library()[0] is None, reason=f"cpp: {library()[1]}")
@pytest.mark.parametrize("mode", TRAINING)
def test_out_of_memory_leaves_a_usable_model(generator, monkeypatch, mode):
    """Whichever allocation of a training step fails, the error is torch's own, and the next step is as without it."""
    model, video = make(generator, torch.float64, "cpp", drop_path_rate=0.0, checkpoint=mode).train(), clip(generator)
    exact, real = gradients(model, model, video), torch.empty_like
    for fails in (0, 3, 9, 17, 24):
        left = [fails]

        def full(*args, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("no memory left")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", full)
            with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
                gradients(model, model, video)
        for what, value in gradients(model, model, video).items():
            assert torch.equal(value, exact[what]), what
