# SPDX-License-Identifier: Apache-2.0
"""The residual stream: which sums merge with which LayerNorm, on which backend, and what hooks see of it."""

from functools import partial

import blocks
import pytest
import torch
from blocks import TINY, clip
from oracle import assert_no_worse, device_of
from torch import nn

from timesformer import TimeSformer
from timesformer import mlp as mlp_module
from timesformer.layers import steps_of
from timesformer.mlp import Mlp
from timesformer.model import DividedBlock, JointBlock
from timesformer.stream import Stream
from timesformer_kernels import fused as steps

MODES = ("none", "light", "full")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[name for name in steps._LOADERS if name != "reference"])
def counted(request, monkeypatch):
    """(name of a backend with fused steps of its own that runs here, {step: calls that it has served})."""
    name = request.param
    if reason := steps.why_not(name, device_of(name), torch.float32, 32):
        pytest.skip(f"{name}: {reason}")
    own, calls = steps._LOADERS[name](), dict.fromkeys(steps.Steps._fields, 0)

    def count(field):
        def run(*args, **options):
            calls[field] += 1
            return getattr(own, field)(*args, **options)

        return run

    monkeypatch.setitem(steps._LOADERS, name, lambda: steps.Steps(*map(count, steps.Steps._fields)))
    steps.resolve.cache_clear()
    yield name, calls
    steps.resolve.cache_clear()


def model_on(name, generator, **options):
    model = TimeSformer(**{**TINY, "num_frames": 2, **options}, backend=name)
    return blocks.randomise(model, generator).to(device_of(name))


def video_on(name, generator):
    return clip(generator, 1, 2, 16, 16, torch.float32).to(device_of(name))


# Three sums with LayerNorm and one GELU to a divided block; the last sum merges with the next block's first LayerNorm.
FORWARD = dict(add_layer_norm_fwd=6, bias_gelu_fwd=2)
BACKWARD = dict(add_layer_norm_bwd=6, bias_gelu_bwd=2)


@pytest.mark.parametrize("training", [False, True])
def test_the_embedding_is_summed_in_the_first_norm(counted, generator, monkeypatch, training):
    """No LayerNorm of a block reads a sum that another pass has written; the table is one for all clips."""
    name, _ = counted
    seen, own = [], steps.resolve(name, device_of(name), torch.float32, 32)[1]

    def forward(x, branch, *options):
        seen.append((x.stride(0), branch is not None))
        return own.add_layer_norm_fwd(x, branch, *options)

    monkeypatch.setitem(steps._LOADERS, name, lambda: own._replace(add_layer_norm_fwd=forward))
    steps.resolve.cache_clear()
    model = model_on(name, generator).train(training)
    with torch.set_grad_enabled(training):
        model(clip(generator, 2, 2, 16, 16, torch.float32).to(device_of(name)))
    assert len(seen) == 6 and all(merged for _, merged in seen)
    assert [stride == 0 for stride, _ in seen] == [True] + [False] * 5


def test_inference_takes_the_fused_steps(counted, generator):
    name, calls = counted
    model = model_on(name, generator).eval()
    with torch.no_grad():
        model(video_on(name, generator))
    assert calls == {**dict.fromkeys(calls, 0), **FORWARD}
    with torch.no_grad():
        model.fuse()(video_on(name, generator))
    assert calls["add_layer_norm_fwd"] == 12 and calls["bias_gelu_fwd"] == 4


def test_inference_in_parts(counted, generator, monkeypatch):
    """Where a fused GELU needs memory of its own, the MLP runs on equal parts of the rows: the same result."""
    name, calls = counted
    device = device_of(name)
    mlp, x = blocks.randomise(Mlp(32, 64), generator).to(device), torch.randn(2, 9, 32, generator=generator).to(device)
    with torch.no_grad():
        whole = mlp(x, backend=name)
        assert calls["bias_gelu_fwd"] == 1
        monkeypatch.setitem(mlp_module.ROWS, device, 8)
        torch.testing.assert_close(mlp(x, backend=name), whole)
    assert calls["bias_gelu_fwd"] == 1 + 3
    mlp(x, backend=name)
    assert calls["bias_gelu_fwd"] == 1 + 3 + 1  # with autograd everything is kept anyway


@pytest.mark.parametrize("mode, again", [("none", (6, 2)), ("light", (6, 2)), ("full", (6, 2))])
def test_training_takes_the_fused_steps(counted, generator, mode, again):
    """And makes each LayerNorm and GELU anew in the backward, whatever else it makes anew."""
    name, calls = counted
    model = model_on(name, generator, drop_path_rate=0.5, checkpoint=mode).train()
    model(video_on(name, generator)).sum().backward()
    forward = {field: count + more for (field, count), more in zip(FORWARD.items(), again, strict=True)}
    if mode != "full" and device_of(name) == "cpu":  # what the class row's query of the last block reads is kept
        forward["add_layer_norm_fwd"] -= 1
    assert calls == {**forward, **BACKWARD}


def test_an_attention_backend_without_steps_takes_those_that_auto_takes():
    x = torch.zeros(2, 3, 16)
    chosen = steps.resolve("auto", "cpu", torch.float32, 16)[0]
    expected = None if chosen == "reference" else chosen
    assert steps_of(x, "auto") == expected and steps_of(x, "reference") is None
    assert steps_of(x, "cuda") == expected  # cannot run here at all: attention says so


# --- values -----------------------------------------------------------------------------------------------------------


def recorded(block):
    drawn, draw = [], block.drop_path.draw

    def keep(*shape, like):
        drawn.append(draw(*shape, like=like))
        return drawn[-1]

    block.drop_path.draw = keep
    return drawn


def divided(p, x, frames, masks):
    time, space, clips = masks or (None, None, None)
    time = None if time is None else time[..., 0]
    return blocks.mlp(p, "", blocks.divided(p, "", x, frames, 4, True, time, space), clips)


def joint(p, x, frames, masks):
    attended, clips = masks or (None, None)
    return blocks.mlp(p, "", blocks.joint(p, "", x, 4, attended), clips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["all-rows", "drop-path"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind, oracle", [(DividedBlock, divided), (JointBlock, joint)], ids=["divided", "joint"])
def test_blocks_by_the_rule(backend, generator, kind, oracle, mode, rate, dtype):
    """Two blocks in a row: values and all gradients against float64, within the rule's factor of plain torch."""
    if mode == "full" and (rate or dtype != torch.float32):
        pytest.skip("nothing of its own")
    torch.manual_seed(1)
    device, frames = device_of(backend), 2
    pair = [kind(32, 64, drop=0.0, layer_norm_eps=1e-6, num_heads=4, drop_path=rate) for _ in range(2)]
    pair = nn.ModuleList(blocks.randomise(block, generator).to(device, dtype) for block in pair).train()
    x = torch.randn(3, 1 + 6 * frames, 32, generator=generator).to(dtype)
    dout = torch.randn(3, 1 + 6 * frames, 32, generator=generator).to(dtype)
    drawn = []
    for block in pair:
        block.backend, block.checkpoint = backend, mode
        drawn.append(recorded(block))
    leaf = x.to(device).requires_grad_()
    stream = Stream(leaf)
    for block in pair:
        block.run(stream, frames)
    out = stream.sum()
    got = [out.detach(), *torch.autograd.grad(out, [leaf, *pair.parameters()], dout.to(device))]

    def plain(dtype):
        p = {name: q.detach().cpu().to(dtype).requires_grad_() for name, q in pair.named_parameters()}
        y = z = x.to(dtype).requires_grad_()
        for i, masks in enumerate(drawn):
            masks = [m.cpu().to(dtype) for m in masks]
            masks = [m.flatten() if m.shape[1:] == (1, 1) else m for m in masks]
            z = oracle({n.removeprefix(f"{i}."): q for n, q in p.items() if n[0] == str(i)}, z, frames, masks)
        return [z.detach(), *torch.autograd.grad(z, [y, *p.values()], dout.to(dtype))]

    names = ["out", "dx", *(name for name, _ in pair.named_parameters())]
    for name, a, exact, eager in zip(names, got, plain(torch.float64), plain(dtype), strict=True):
        assert_no_worse(name, a.cpu(), exact, eager)
    assert bool(drawn[0]) == (rate > 0)


def test_a_sum_is_formed_once():
    """Whoever asks first, sum or LayerNorm; and the caller's x is left alone."""
    x, branch, norm = torch.randn(2, 3, 8), torch.randn(2, 3, 8), nn.LayerNorm(8)
    expected, before = x + branch, x.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            stream = Stream(x)
            stream.add(branch.clone())
            assert torch.equal(stream.sum(), expected) and torch.equal(stream.sum(), expected)
            normed, _ = stream.norm(norm, "auto")
            torch.testing.assert_close(normed, norm(expected))
            assert torch.equal(stream.sum(), expected) and torch.equal(x, before)


# --- hooks ------------------------------------------------------------------------------------------------------------


def outputs(model, video):
    """What forward hooks on the blocks see go in and come out."""
    seen, handles = [], []
    for block in model.blocks:
        hook = partial(lambda m, args, out: seen.append((args[0].clone(), out.clone())))
        handles.append(block.register_forward_hook(hook))
    out = model(video)
    for handle in handles:
        handle.remove()
    return out, seen


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_hooks_on_blocks_see_the_sums(backend, generator, grad):
    model, video = model_on(backend, generator).eval(), video_on(backend, generator)
    with torch.set_grad_enabled(grad):
        exact = model(video)
        got, seen = outputs(model, video)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    p = {name: q.detach().cpu().double() for name, q in model.named_parameters()}
    z = blocks.with_time(p, blocks.frame_tokens(p, video.cpu().double(), model.config.grid))
    for i, (x, out) in enumerate(seen):
        torch.testing.assert_close(x.cpu().double(), z, rtol=1e-4, atol=1e-4)
        q = {n.removeprefix(f"blocks.{i}."): t for n, t in p.items() if n.startswith(f"blocks.{i}.")}
        z = divided(q, z, 2, None)
        torch.testing.assert_close(out.cpu().double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "part", ["temporal_norm1", "norm1", "norm2", "mlp", "mlp.fc1", "mlp.fc2", "attn.qkv", "temporal_attn"]
)
def test_hooks_on_parts_are_called(generator, part):
    model, calls = model_on("auto", generator).eval(), []
    exact = model(video_on("auto", generator.manual_seed(1)))
    layer = model.blocks[0].get_submodule(part)
    layer.register_forward_hook(lambda m, args, out: calls.append(out))
    layer.register_full_backward_hook(lambda m, dx, dy: calls.append(dy))
    got = model(video_on("auto", generator.manual_seed(1)))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert len(calls) == 2


def test_global_hooks_see_every_module(generator):
    model, seen = model_on("auto", generator).eval(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.add(m))
    try:
        with torch.no_grad():
            model(video_on("auto", generator))
    finally:
        handle.remove()
    wanted = {m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.Linear, DividedBlock))}
    assert wanted <= seen


class Wrapper(nn.Module):
    """As activation checkpointing or sharding libraries wrap a block."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, x, *args):
        self.calls += 1
        return self.block(x, *args)


def test_a_wrapped_block_is_called(generator):
    model, video = model_on("auto", generator).eval(), video_on("auto", generator)
    exact = model(video)
    model.blocks[0] = Wrapper(model.blocks[0])
    torch.testing.assert_close(model(video), exact, rtol=1e-5, atol=1e-5)
    assert model.blocks[0].calls == 1
    forward, calls = model.blocks[1].forward, []
    model.blocks[1].forward = lambda *args: calls.append(1) or forward(*args)
    torch.testing.assert_close(model(video), exact, rtol=1e-5, atol=1e-5)
    assert calls == [1]
