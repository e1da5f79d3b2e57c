# SPDX-License-Identifier: Apache-2.0
"""Attention maps against probabilities formed on the way through the model of blocks.py; rollout against matrices."""

import blocks
import pytest
import torch
from blocks import TINY, clip
from einops import rearrange, repeat

from timesformer import TimeSformer, maps
from timesformer.maps import attention_maps, rollout

KINDS = ("divided_space_time", "joint_space_time", "space_only")
EXACT = dict(rtol=1e-10, atol=1e-12)
DEPTH, FRAMES, GRID, HEADS = 3, 5, (2, 3), 4  # sizes differ, so that no two axes can be swapped unnoticed
N = GRID[0] * GRID[1]
SIZE = {**TINY, "depth": DEPTH, "img_size": (16, 24), "num_frames": FRAMES}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=KINDS)
def model(request, generator):
    return make(generator, request.param)


@pytest.fixture(params=[None, 40], ids=["whole", "tiles"])
def tile(request, monkeypatch):
    """Once as it is, once with tiles so small that groups are cut into queries."""
    if request.param:
        monkeypatch.setattr(maps, "_TILE", request.param)


def make(generator, kind="divided_space_time", dtype=torch.float64, **options):
    model = TimeSformer(**{**SIZE, "attention_type": kind, **options}).to(dtype)
    return blocks.randomise(model, generator, peak=8.0).eval()


def pixels(generator, batch=2, dtype=torch.float64):
    return clip(generator, batch=batch, frames=FRAMES, height=16, width=24, dtype=dtype)


def probabilities(p, name, x):
    """x (rows, length, dim), normalised -> (rows, heads, length, length)"""
    q, k, _ = rearrange(blocks.linear(p, f"{name}.qkv", x), "r l (three h d) -> three r h l d", three=3, h=HEADS)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def oracle(model, video):
    """Of every layer: (time maps or None, space maps), probabilities written down on the way."""
    p, kind = blocks.parameters_of(model), model.config.attention_type
    tokens, found, b = blocks.frame_tokens(p, video, GRID), [], len(video)
    space_only = kind == "space_only"
    x = rearrange(tokens, "b t n d -> (b t) n d") if space_only else blocks.with_time(p, tokens)
    for i in range(DEPTH):
        name = f"blocks.{i}."
        if kind == "divided_space_time":
            row, patches = x[:, :1], rearrange(x[:, 1:], "b (n t) d -> (b n) t d", t=FRAMES)
            along = blocks.norm(p, f"{name}temporal_norm1", patches)
            time = rearrange(probabilities(p, f"{name}temporal_attn", along), "(b n) h l m -> b n h l m", b=b)
            out = blocks.attention(p, f"{name}temporal_attn", along, HEADS)
            patches = patches + blocks.linear(p, f"{name}temporal_fc", out)
            frame = rearrange(patches, "(b n) t d -> (b t) n d", b=b)
            frame = torch.cat([repeat(row, "b 1 d -> (b t) 1 d", t=FRAMES), frame], 1)
            space = probabilities(p, f"{name}attn", blocks.norm(p, f"{name}norm1", frame))
            found.append((time.detach(), rearrange(space, "(b t) h l m -> b t h l m", b=b).detach()))
            x = blocks.divided(p, name, x, FRAMES, HEADS)
        else:
            space = probabilities(p, f"{name}attn", blocks.norm(p, f"{name}norm1", x))
            found.append((None, rearrange(space, "(b t) h l m -> b t h l m", b=b).detach()))
            x = blocks.joint(p, name, x, HEADS)
        x = blocks.mlp(p, name, x)
    return found


# --- maps ------------------------------------------------------------------------------------------------------------


def test_maps_of_every_layer(model, generator, tile):
    video = pixels(generator)
    for layer, (time, space) in enumerate(oracle(model, video)):
        assert space.amax(-1).mean() > 0.4  # peaked: a wrong grouping would show
        for number in (layer, layer - DEPTH):
            got = attention_maps(model, video, number)
            torch.testing.assert_close(got.space, space, **EXACT)
            if time is None:
                assert got.time is None
            else:
                torch.testing.assert_close(got.time, time, **EXACT)


def test_heads(model, generator, tile):
    video = pixels(generator)
    time, space = oracle(model, video)[1]
    for head, fuse in (
        (2, lambda p: p[:, :, 2]),
        ("mean", lambda p: p.mean(2)),
        ("max", lambda p: p.amax(2)),
        ("min", lambda p: p.amin(2)),
    ):
        got = attention_maps(model, video, 1, head=head)
        torch.testing.assert_close(got.space, fuse(space), **EXACT)
        if time is not None:
            torch.testing.assert_close(got.time, fuse(time), **EXACT)


def test_only_one_of_the_two(generator):
    model, video = make(generator), pixels(generator)
    both = attention_maps(model, video)
    assert attention_maps(model, video, which=("time",)).space is None
    assert attention_maps(model, video, which=("space",)).time is None
    assert torch.equal(attention_maps(model, video, which=("time",)).time, both.time)
    assert torch.equal(attention_maps(model, video, which=("space",)).space, both.space)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_space_maps_of_hugging_face(kind, generator):
    transformers = pytest.importorskip("transformers")
    from timesformer.weights import to_native

    config = transformers.TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=5, attention_type=kind, attn_implementation="eager",
    )  # fmt: skip
    theirs = blocks.randomise(transformers.TimesformerForVideoClassification(config).double(), generator).eval()
    ours = TimeSformer(**TINY, attention_type=kind).double().eval()
    ours.load_state_dict(to_native(theirs.state_dict(), "huggingface"))
    video = clip(generator)
    with torch.no_grad():
        attentions = theirs(video.transpose(1, 2), output_attentions=True).attentions
    assert len(attentions) == 2
    for layer, exact in enumerate(attentions):
        got = attention_maps(ours, video, layer).space
        torch.testing.assert_close(got.flatten(0, 1), exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_give_float32_rows_that_sum_to_one(dtype, generator):
    model, video = make(generator, dtype=dtype), pixels(generator, dtype=dtype)
    for shown in attention_maps(model, video):
        assert shown.dtype == torch.float32
        torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:-1]))
    with torch.autocast("cpu", torch.bfloat16):
        for shown in attention_maps(model.float(), video.float()):
            torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:-1]))


def test_the_model_is_left_as_it_was(model, generator):
    video = pixels(generator)
    before = model(video)
    attention_maps(model, video)
    rollout(model, video)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(video), before)


# --- rollout ---------------------------------------------------------------------------------------------------------


def whole(fused, tokens, place):
    """Maps (groups, L, L) into one matrix over all tokens: place(group, member) -> row; the class row's mean."""
    full = torch.zeros(tokens, tokens, dtype=torch.float64)
    for group, a in enumerate(fused):
        rows = torch.tensor([place(group, member) for member in range(a.shape[0])])
        weight = 1 / (1 + (rows == 0).double() * (len(fused) - 1))
        full[rows[:, None], rows[None, :]] += weight[:, None] * a
    return full


def half_identity(p, discard):
    """(P + I) over its row sums, the smallest probabilities of every row set to zero first."""
    drop = p.shape[-1] - max(1, round((1 - discard) * p.shape[-1]))
    p = p.scatter(-1, p.argsort(-1)[..., :drop], 0.0)
    p = p + torch.eye(p.shape[-1], dtype=p.dtype)
    return p / p.sum(-1, keepdim=True)


def full_rollout(model, video, fuse, discard):
    """The class token's row of the product of all layers' matrices over all tokens, (B, T, h, w)."""
    kind, found = model.config.attention_type, oracle(model, video)
    answers = []
    for b in range(len(video)):
        if kind == "space_only":
            frames = []
            for t in range(FRAMES):
                product = torch.eye(1 + N, dtype=torch.float64)
                for _, space in found:
                    product = half_identity(fuse(space[b, t]), discard) @ product
                frames.append(rearrange(product[0, 1:], "(h w) -> h w", h=GRID[0]) / FRAMES)
            answers.append(torch.stack(frames))
            continue
        tokens = 1 + N * FRAMES
        product = torch.eye(tokens, dtype=torch.float64)
        for time, space in found:
            if time is not None:
                a = half_identity(torch.stack([fuse(p) for p in time[b]]), discard)
                step = whole(a, tokens, lambda n, t: 1 + n * FRAMES + t)
                step[0, 0] = 1  # the class token takes no part
                product = step @ product
                place = lambda t, n: 0 if n == 0 else 1 + (n - 1) * FRAMES + t  # noqa: E731
            else:
                place = lambda _, row: row  # noqa: E731
            product = whole(half_identity(torch.stack([fuse(p) for p in space[b]]), discard), tokens, place) @ product
        torch.testing.assert_close(product.sum(1), torch.ones(tokens, dtype=torch.float64))
        answers.append(rearrange(product[0, 1:], "(h w t) -> t h w", h=GRID[0], t=FRAMES))
    return torch.stack(answers)


FUSE = {"mean": lambda p: p.mean(0), "max": lambda p: p.amax(0), "min": lambda p: p.amin(0)}


@pytest.mark.parametrize("fusion, discard", [("mean", 0.0), ("max", 0.0), ("min", 0.0), ("mean", 0.5), ("max", 0.9)])
def test_rollout_is_the_class_row_of_the_whole_product(model, generator, tile, fusion, discard):
    video = pixels(generator)
    exact = full_rollout(model, video, FUSE[fusion], discard)
    got = rollout(model, video, fusion=fusion, discard=discard)
    torch.testing.assert_close(got, exact, **EXACT)
    assert (exact.amax((1, 2, 3)) > 1.5 * exact.mean((1, 2, 3))).all()  # the model looks somewhere


def test_rollout_shares(model, generator):
    """Shares of a whole: positive, below one together, the class token's own at least 2 ** -layers."""
    total = rollout(model, pixels(generator)).sum((1, 2, 3))
    assert (total > 0).all() and (total <= 1 - 2.0**-DEPTH + 1e-12).all()


def test_rollout_of_long_clips_holds_no_square_matrix(generator, monkeypatch):
    """96 frames: nothing as large as a matrix over all tokens is ever formed."""
    model = make(generator, dtype=torch.float32, img_size=64, depth=2)
    video = clip(generator, batch=1, frames=96, height=64, width=64, dtype=torch.float32)
    tokens = 1 + 64 * 96
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(maps, "_TILE", 1 << 18)
    with Watch():
        got = rollout(model, video)
    assert got.shape == (1, 96, 8, 8) and 0 < got.sum() < 1
    assert largest < tokens * tokens // 10, largest


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, message", [
    (lambda m, v: attention_maps(m, v, 3), "layer: got 3, expected one of the 3 layers"),
    (lambda m, v: attention_maps(m, v, head=4), "head: got 4, expected one of the 4 heads, 0 to 3"),
    (lambda m, v: attention_maps(m, v, head=-1), "head: got -1"),
    (lambda m, v: attention_maps(m, v, head="sum"), "head: got 'sum', expected None, mean, max, min or the number"),
    (lambda m, v: attention_maps(m, v, which=("depth",)), "which: got"),
    (lambda m, v: attention_maps(m.train(), v), "model: got one in training mode"),
    (lambda m, v: rollout(m.train(), v), "model: got one in training mode"),
    (lambda m, v: rollout(m, v, fusion="sum"), "fusion: got 'sum', expected one of mean, max, min"),
    (lambda m, v: rollout(m, v, discard=1.0), "discard: got 1.0"),
    (lambda m, v: rollout(m, v[0]), "video: got shape"),
], ids=lambda value: None)  # fmt: skip
def test_bad_input(generator, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(generator), pixels(generator))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_time_maps_without_time_attention(generator, kind):
    with pytest.raises(ValueError, match=f"attention_type '{kind}' has no time attention"):
        attention_maps(make(generator, kind), pixels(generator), which=("time",))
