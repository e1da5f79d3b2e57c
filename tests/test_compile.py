# SPDX-License-Identifier: Apache-2.0
"""torch.compile of the whole model: one graph, one for all batches and frames, and the same numbers as without it."""

import blocks
import pytest
import torch
from blocks import TINY, clip
from torch._dynamo.testing import CompileCounterWithBackend

from timesformer import TimeSformer
from timesformer_kernels import time_attention

pytestmark = pytest.mark.usefixtures("traceable")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(generator, dtype=torch.float64, **options):
    return blocks.randomise(TimeSformer(**{**TINY, **options}).to(dtype), generator)


def factors(model, batch, frames):
    """Fixed factors of stochastic depth, of every shape that a block draws: half of the rows dropped."""
    gen = torch.Generator().manual_seed(4)
    sizes = (16, 1), (frames,), (1, 1)
    masks = {(batch, *s): 2.0 * (torch.rand(batch, *s, generator=gen) > 0.5) for s in sizes}
    for block in model.blocks:
        block.drop_path.rate = 0.5
        block.drop_path.draw = lambda *shape, like: masks[tuple(shape)].to(like.dtype)


def results(run, model, video):
    """[logits, dvideo, gradients of the parameters], or logits alone without autograd."""
    if not torch.is_grad_enabled():
        return [run(video)]
    video = video.clone().requires_grad_()
    out = run(video)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [video, *model.parameters()])]


def compare(compiled, model, video, **bounds):
    for got, exact in zip(results(compiled, model, video), results(model, model, video), strict=True):
        torch.testing.assert_close(got, exact, **bounds)


@pytest.mark.parametrize("mode", ["none", "light", "full"])
def test_training(generator, mode):
    """Across two blocks, dropped rows included, in float64: the same values and gradients but for rounding."""
    model = make(generator, checkpoint=mode, qk_scale=0.4).train()
    factors(model, 2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare(compiled, model, clip(generator), rtol=1e-9, atol=1e-10)


def test_one_graph_for_all_batches_and_frames(generator):
    """Height and width included: nothing is compiled again, with and without gradients."""
    model = make(generator, depth=1).eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            first = clip(generator).requires_grad_(grad)
            for dim in (0, 2):
                torch._dynamo.mark_dynamic(first, dim)
            torch.testing.assert_close(compiled(first), model(first))
            with torch._dynamo.config.patch(error_on_recompile=True):
                for batch, frames in ((3, 4), (2, 7), (5, 2), (4, 9)):
                    compare(compiled, model, clip(generator, batch, frames), rtol=1e-9, atol=1e-10)


def test_dynamic_in_every_size(generator):
    """dynamic=True, where numbers of the model are symbols as well."""
    model = make(generator, torch.float32, depth=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(clip(generator, 2, 5, 32, 48, torch.float32))  # equal sizes would be one symbol
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, frames, height, width in ((3, 6, 32, 32), (2, 4, 48, 24), (5, 3, 24, 40)):
                video = clip(generator, batch, frames, height, width, torch.float32)
                torch.testing.assert_close(compiled(video), model(video), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "half-block"])
def test_dynamic_with_a_scale_of_ones_own(generator, whole, mode):
    """The scale is a symbol then, and is still checked; one graph serves all batches and frames, and each block's."""
    grad = mode == "train"
    module = make(generator, depth=2, qk_scale=0.4, drop_path_rate=0.0).train(grad)
    if not whole:
        module = module.blocks[0]
    graphs = []
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch, frames in ((6, 5), (2, 4), (4, 7), (5, 9)):  # equal sizes would be one symbol
            video = clip(generator, batch, frames, 32, 48)
            x = (video,) if whole else (video.flatten(1)[:, : 32 * (1 + 24 * frames)].view(batch, -1, 32), frames)
            got, exact = compiled(*x), module(*x)
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)
            if grad:
                pairs = [torch.autograd.grad(y.square().sum(), module.parameters()) for y in (got, exact)]
                torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-10)
            graphs.append(counting.frame_count)
    assert graphs == graphs[:1] * 4 and graphs[0] > 0


@pytest.mark.parametrize("scale", [float("inf"), float("-inf")])  # of a NaN the compiler makes no symbol
def test_dynamic_scales_are_checked(scale):
    q = torch.zeros(2, 9, 2, 8)
    attend = torch.compile(time_attention, backend="aot_eager", dynamic=True)
    with pytest.raises(ValueError, match=f"scale: got {scale}, expected a finite number"):
        attend(q, q, q, frames=4, scale=scale)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_inductor(generator, mode):
    """Generated code, which fuses sums, LayerNorms and GELU by itself."""
    model = make(generator, torch.float32, depth=1).train(mode == "train")
    compiled = torch.compile(model, fullgraph=True)
    with torch.set_grad_enabled(mode == "train"):
        compare(compiled, model, clip(generator, dtype=torch.float32), rtol=1e-3, atol=1e-4)


def test_a_fused_model_compiled_sees_its_parameters(generator):
    """Compiled code never uses what `fuse` keeps, so that it cannot be stale."""
    model = make(generator, depth=1).eval().fuse()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video = clip(generator)
    with torch.no_grad():
        compiled(video)
        model.blocks[0].temporal_fc.weight.mul_(3)
        torch.testing.assert_close(compiled(video), model.unfuse()(video), rtol=1e-9, atol=1e-10)
