# SPDX-License-Identifier: Apache-2.0
"""Tokens and features of every layer against the independent model of blocks.py, and Hugging Face's hidden states."""

import blocks
import pytest
import torch
from blocks import TINY, clip
from einops import rearrange, reduce

from timesformer import TimeSformer
from timesformer.features import features, features_of_views, forward_intermediates

KINDS = ("divided_space_time", "joint_space_time", "space_only")
EXACT = dict(rtol=1e-10, atol=1e-11)
DEPTH, FRAMES, GRID = 3, 5, (4, 6)  # sizes differ, so that no two axes can be swapped unnoticed


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def model(kind, generator):
    options = {**TINY, "attention_type": kind, "depth": DEPTH, "img_size": (32, 48), "num_frames": FRAMES}
    return blocks.randomise(TimeSformer(**options).double(), generator).eval()


@pytest.fixture
def video(generator):
    return clip(generator, frames=FRAMES, height=32, width=48)


def oracle(model, video):
    """After every layer: (class rows [B, 1 or T, dim], patches [B, T, h, w, dim]), by blocks.py."""
    p, kind = blocks.parameters_of(model), model.config.attention_type
    tokens, found = blocks.frame_tokens(p, video, GRID), []
    space_only = kind == "space_only"
    x = rearrange(tokens, "b t n d -> (b t) n d") if space_only else blocks.with_time(p, tokens)
    for i in range(DEPTH):
        name = f"blocks.{i}."
        divided = kind == "divided_space_time"
        x = blocks.divided(p, name, x, FRAMES, 4) if divided else blocks.joint(p, name, x, 4)
        x = blocks.mlp(p, name, x)
        if space_only:
            rows = rearrange(x, "(b t) n d -> b t n d", t=FRAMES)
            found.append((rows[:, :, 0], rearrange(rows[:, :, 1:], "b t (h w) d -> b t h w d", h=GRID[0])))
        else:
            found.append((x[:, :1], rearrange(x[:, 1:], "b (h w t) d -> b t h w d", h=GRID[0], t=FRAMES)))
    return found, lambda x: blocks.norm(p, "norm", x)


def sequence(rows, patches):
    """The tokens as the model's blocks hand them on."""
    if rows.shape[1] > 1:  # space-only: every frame on its own
        patches = rearrange(patches, "b t h w d -> (b t) (h w) d")
        return torch.cat([rearrange(rows, "b t d -> (b t) 1 d"), patches], 1)
    return torch.cat([rows, rearrange(patches, "b t h w d -> b (h w t) d")], 1)


def test_features_of_every_layer(model, video):
    found, last_norm = oracle(model, video)
    for layer, (rows, patches) in enumerate(found):
        expected = {"cls": reduce(rows, "b r d -> b d", "mean"), "patch": patches}
        for norm in (False, True):
            shown = {kind: last_norm(x) if norm else x for kind, x in expected.items()}
            shown["frame"] = reduce(shown["patch"], "b t h w d -> b t d", "mean")
            for kind, exact in shown.items():
                for number in (layer, layer - DEPTH):
                    got = features(model, video, number, kind, norm)
                    assert got.is_contiguous()
                    torch.testing.assert_close(got, exact.detach(), **EXACT)


def test_default_is_what_the_classifier_sees(model, video):
    with torch.no_grad():
        torch.testing.assert_close(features(model, video), model.forward_features(video), **EXACT)
        assert not torch.allclose(features(model, video, norm=False), model.forward_features(video))
        plain = features(model, video, -2)
        torch.testing.assert_close(plain, features(model, video, -2, norm=False), rtol=0, atol=0)


def test_intermediates(model, video):
    found, last_norm = oracle(model, video)
    last, maps = model.forward_intermediates(video)
    assert len(maps) == DEPTH
    for got, (_, patches) in zip(maps, found, strict=True):
        torch.testing.assert_close(got, rearrange(patches, "b t h w d -> b d t h w"), **EXACT)
    torch.testing.assert_close(last, last_norm(sequence(*found[-1])), **EXACT)

    options = dict(return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True)
    for indices, numbers in (([2, 0], [2, 0]), (2, [1, 2]), ([-1, 1], [2, 1])):
        pairs = forward_intermediates(model, video, indices, **options)
        for (tokens, prefix), number in zip(pairs, numbers, strict=True):
            rows, patches = found[number]
            torch.testing.assert_close(tokens, last_norm(rearrange(patches, "b t h w d -> b (h w t) d")), **EXACT)
            torch.testing.assert_close(prefix, last_norm(rows), **EXACT)


def test_stop_early_runs_no_later_layer(model, video):
    found, last_norm = oracle(model, video)
    ran = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    last, _ = forward_intermediates(model, video, [0, 1], stop_early=True)
    assert ran == [0, 1]
    torch.testing.assert_close(last, last_norm(sequence(*found[1])), **EXACT)
    ran.clear()
    features(model, video, 0)
    assert ran == [0]


def test_gradients_reach_the_video(model, video):
    video.requires_grad_()
    (maps,) = model.forward_intermediates(video, 1, intermediates_only=True)
    weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(3), dtype=maps.dtype)
    (got,) = torch.autograd.grad((maps * weight).sum(), video)
    patches = oracle(model, video)[0][-1][1]
    (exact,) = torch.autograd.grad((rearrange(patches, "b t h w d -> b d t h w") * weight).sum(), video)
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9 * exact.abs().max().item())


def test_other_sizes_at_run_time(model, generator):
    """Half the frames, a grid turned on its side: maps have the input's sizes."""
    maps = features(model, clip(generator, batch=1, frames=2, height=48, width=32), kind="patch")
    assert maps.shape == (1, 2, 6, 4, 32) and maps.isfinite().all()


def test_views_in_batches(model, generator):
    views = clip(generator, batch=5, frames=FRAMES, height=32, width=48, dtype=torch.float32)
    got = features_of_views(model, views, 2, layer=1, kind="frame")
    assert got.dtype == torch.float64  # the model's
    torch.testing.assert_close(got, features(model, views.double(), 1, "frame").detach(), **EXACT)


def test_hidden_states_of_hugging_face():
    """Every layer's patches equal transformers' hidden states on the same random weights."""
    transformers = pytest.importorskip("transformers")
    from timesformer.weights import to_native

    config = transformers.TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=5,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    theirs = blocks.randomise(transformers.TimesformerForVideoClassification(config).double(), generator).eval()
    ours = TimeSformer(**TINY).double().eval()
    ours.load_state_dict(to_native(theirs.state_dict(), "huggingface"))
    video = clip(generator)
    with torch.no_grad():
        hidden = theirs(video.transpose(1, 2), output_hidden_states=True).hidden_states[1:]  # 0 is the embedding
        pairs = forward_intermediates(ours, video, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    for (tokens, prefix), exact in zip(pairs, hidden, strict=True):
        torch.testing.assert_close(torch.cat([prefix, tokens], 1), exact, **EXACT)


@pytest.mark.parametrize("call, message", [
    (lambda m, v: features(m, v, 3), r"layer: got 3, expected one of the 3 layers, -3 to 2"),
    (lambda m, v: features(m, v, -4), r"layer: got -4"),
    (lambda m, v: features(m, v, kind="token"), r"kind: got 'token', expected one of cls, patch, frame"),
    (lambda m, v: features(m, v[0]), r"video: got shape \(3, 5, 32, 48\)"),
    (lambda m, v: features(m, v.float()), r"video: got dtype torch.float32"),
    (lambda m, v: m.forward_intermediates(v, [0, 7]), r"indices: got 7"),
    (lambda m, v: m.forward_intermediates(v, []), r"indices: got an empty list"),
    (lambda m, v: m.forward_intermediates(v, 4), r"indices: got 4, expected a number of last layers from 1 to 3"),
    (lambda m, v: m.forward_intermediates(v, output_fmt="NHWC"), r"output_fmt: got 'NHWC', expected one of NCTHW, NLC"),
], ids=lambda value: None)  # fmt: skip
def test_bad_input(generator, call, message):
    model = TimeSformer(**{**TINY, "depth": DEPTH}).double().eval()
    with pytest.raises(ValueError, match=message):
        call(model, clip(generator, frames=FRAMES, height=32, width=48))
    with pytest.raises(TypeError, match="layer: got True, expected an integer"):
        features(model, clip(generator), True)
