# SPDX-License-Identifier: Apache-2.0
"""What training keeps for its backward and computes twice, and peak memory against Hugging Face's model: measured."""

from functools import partial

import blocks
import pytest
import torch
from blocks import TINY, clip
from torch.utils._python_dispatch import TorchDispatchMode

from timesformer import TimeSformer
from timesformer.benchmarking.cost import peak_bytes
from timesformer.model import DividedBlock, JointBlock

EXACT = dict(rtol=1e-10, atol=1e-11)
MODES = ("none", "light", "full")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def kept(call, *known):
    """Storages that the forward of a call keeps for its backward, beside those of `known` tensors: their bytes."""
    skip, found = {x.untyped_storage().data_ptr() for x in known}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # a node that keeps its own result would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()  # alive until the end
    del out
    return sum(found.values())


def block_of(kind, checkpoint, drop_path=0.0, dim=256, **options):
    block = kind(dim, 4 * dim, drop=0.0, layer_norm_eps=1e-6, num_heads=4, drop_path=drop_path, **options)
    block.checkpoint = checkpoint
    return block.train()


@pytest.mark.parametrize("drop_path", [0.0, 0.5], ids=["all-rows", "drop-path"])
@pytest.mark.parametrize(
    "kind, checkpoint, count",
    [
        # x, x1, x2; q, k, v and o of time and of space; fc1's result
        pytest.param(DividedBlock, "none", 3 + 4 + 4 + 4, id="divided-none"),
        # x, x1, x2; q, k, v of time and of space
        pytest.param(DividedBlock, "light", 3 + 3 + 3, id="divided-light"),
        pytest.param(JointBlock, "none", 2 + 4 + 4, id="joint-none"),
        pytest.param(JointBlock, "light", 2 + 3, id="joint-light"),
    ],
)
def test_tensors_kept_per_block(kind, checkpoint, count, drop_path):
    """In units of one token tensor, x itself included; statistics of LayerNorm and the folded weights are below 1."""
    block = block_of(kind, checkpoint, drop_path)
    x = torch.randn(2, 1 + 49 * 8, 256, requires_grad=True)
    units = kept(lambda: block(x, 8), *block.parameters()) / (4 * x.numel())
    assert count <= units < count + 0.5


def test_a_full_checkpoint_keeps_the_input_of_each_block():
    model = TimeSformer(**{**TINY, "depth": 4}, drop_path_rate=0.1).train()
    model.set_checkpoint("full")
    video = torch.randn(2, 3, 4, 32, 32)
    units = kept(lambda: model(video), video, *model.parameters()) / (4 * 2 * 65 * 32)
    assert 4 <= units < 4.5  # and no patches, which are gathered again


def test_bfloat16_autocast_keeps_16_bit_activations():
    """Under autocast the stream is wide: three token tensors of four bytes, and the twelve others of two."""
    block = block_of(DividedBlock, "none")
    x = torch.randn(2, 1 + 49 * 8, 256, requires_grad=True)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return block(x, 8)

    # Beside the copies of the weights, in 16 bits: qkv twice, the folded one with its two factors, proj, fc1, fc2
    weights = 2 * sum(p.numel() for name, p in block.named_parameters() if p.dim() == 2) + 2 * 256**2
    units = (kept(call, *block.parameters()) - weights) / (4 * x.numel())
    assert 3 + 12 / 2 - 0.3 < units < 3 + 12 / 2 + 0.5


def run(model, video, mode, seed=3):
    """[logits, dvideo, gradients of the parameters]."""
    torch.manual_seed(seed)
    model.set_checkpoint(mode)
    video = video.clone().requires_grad_()
    out = model(video)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [video, *model.parameters()])]


@pytest.mark.parametrize("kind", ["divided_space_time", "joint_space_time", "space_only"])
@pytest.mark.parametrize(
    "rates", [dict(drop_path_rate=0.0), dict(drop_path_rate=0.5), dict(drop_rate=0.2, attn_drop_rate=0.1)], ids=str
)
def test_all_modes_give_the_same(backend, generator, kind, rates):
    """Values and all gradients, random numbers included."""
    if backend != "reference" and "drop_rate" in rates:
        pytest.skip("dropout is the reference's")
    model = TimeSformer(**{**TINY, "attention_type": kind, **rates}, backend=backend)
    model = blocks.randomise(model.double(), generator).train()
    video = clip(generator)
    none, *others = (run(model, video, mode) for mode in MODES)
    for mode, other in zip(MODES[1:], others, strict=True):
        for a, b in zip(none, other, strict=True):
            torch.testing.assert_close(b, a, msg=f"{mode}: {{}}".format, **EXACT)


test_all_modes_give_the_same.pytestmark.append(pytest.mark.needs(dtype=torch.float64, device="cpu").mark)


class Work(TorchDispatchMode):
    """Multiplications of the matrix products that run, by the shape of the right operand; calls of attention."""

    def __init__(self):
        super().__init__()
        self.products, self.attention = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            shape = (*a.shape, b.shape[1])
            self.products[shape] = self.products.get(shape, 0) + 1
        self.attention += name == "attn_fwd"
        return func(*args, **(kwargs or {}))


def work(model, video, mode):
    model.set_checkpoint(mode)
    with Work() as seen:
        model(video).sum().backward()
    return seen


def test_what_is_computed_twice(generator, need):
    """Light: fc1 and attention once more, no other product; full: every product of a block but its last."""
    need("cpp")
    model = TimeSformer(**{**TINY, "depth": 3}, drop_path_rate=0.0, backend="cpp").train()
    video = clip(generator, dtype=torch.float32)
    found = {mode: work(model, video, mode) for mode in MODES}
    rows, dim, clips = 2 * 65, 32, 2

    def more(mode):
        none = found["none"].products
        counts = {shape: count - none.get(shape, 0) for shape, count in found[mode].products.items()}
        return {shape: count for shape, count in counts.items() if count}

    # Two blocks of all rows, and the class rows of the last.
    assert more("light") == {(rows, dim, 4 * dim): 2, (clips, dim, 4 * dim): 1}
    qkv, fold, proj = (rows, dim, 3 * dim), (dim, dim, dim), (rows, dim, dim)
    bias = (1, dim, dim)
    assert more("full") == {
        **more("light"), qkv: 2 * 3 - 1, fold: 3, bias: 3, proj: 3 + 2, (clips, dim, dim): 1,
    }  # fmt: skip
    # No kernel and no qkv for the one query of the last block.
    assert found["none"].attention == 5 and found["light"].attention == found["full"].attention == 10


@pytest.mark.parametrize("checkpoint", ["some", None, True])
def test_an_unknown_mode(checkpoint):
    with pytest.raises(ValueError, match="checkpoint: got .*expected one of none, light, full"):
        TimeSformer(**TINY, checkpoint=checkpoint)


# --- peak memory ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def against():
    """(ours, Hugging Face's, video): 196 locations, head_dim 64, as in TimeSformer-B, but narrow."""
    transformers = pytest.importorskip("transformers")
    dim, depth, heads = 128, 4, 2
    config = transformers.TimesformerConfig(
        image_size=224, num_frames=8, hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * dim,
    )  # fmt: skip
    theirs = transformers.TimesformerForVideoClassification(config)
    ours = TimeSformer(224, num_classes=2, num_frames=8, embed_dim=dim, depth=depth, num_heads=heads, drop_path_rate=0)
    return ours, theirs, torch.randn(1, 3, 8, 224, 224)


def forward(model, video):
    return model(video) if isinstance(model, TimeSformer) else model(video.transpose(1, 2)).logits


def peak(model, video, grad):
    def call():
        if grad:
            forward(model, video).sum().backward()
            model.zero_grad(set_to_none=True)
        else:
            forward(model, video)

    with torch.set_grad_enabled(grad):
        call()
        return peak_bytes(call, "cpu")


@pytest.mark.parametrize("mode, most", [("none", 0.60), ("light", 0.45), ("full", 0.45)])
def test_training_peak_against_hugging_face(against, mode, most):
    ours, theirs, video = against
    ours.train().set_checkpoint(mode)
    assert peak(ours, video, True) <= most * peak(theirs.train(), video, True)


def test_inference_peak_against_hugging_face(against):
    ours, theirs, video = against
    share = partial(peak, video=video, grad=False)
    assert share(ours.eval()) <= 0.5 * share(theirs.eval())
    assert share(ours.fuse()) <= 0.5 * share(theirs)
    ours.unfuse()
