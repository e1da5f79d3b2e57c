# SPDX-License-Identifier: Apache-2.0
"""Checkpoint names in every format, and strict loading into a model. Files are in test_weights_files.py."""

import itertools
import logging
import math

import pytest
import torch
from checkpoints import KINDS, Named, assert_same, foreign_state, tiny_config, tiny_state

from timesformer.weights import (
    CheckpointError,
    detect_format,
    from_native,
    inflate_vit,
    load_into,
    resize_pos_embed,
    resize_time_embed,
    state_dict_shapes,
    to_native,
)

transformers = pytest.importorskip("transformers")


def hf_model(attention_type="divided_space_time", headless=False, **options):
    config = transformers.TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=3,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=160,
        num_labels=5,
        attention_type=attention_type,
        **options,
    )
    torch.manual_seed(7)
    cls = transformers.TimesformerModel if headless else transformers.TimesformerForVideoClassification
    model = cls(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # the zeros and ones of the initialisation would hide a swapped pair
    return model


# ---- names


@pytest.mark.parametrize("fmt", ["huggingface", "mmaction2"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_follow_the_written_table(fmt, kind):
    state = tiny_state(tiny_config(attention_type=kind))
    foreign = foreign_state(state, fmt)
    assert detect_format(foreign) == fmt
    assert_same(from_native(state, fmt), foreign)
    assert_same(to_native(foreign), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("headless", [False, True], ids=["classifier", "headless"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["qkv-bias", "no-qkv-bias"])
def test_transformers_loads_what_we_write_strictly(kind, headless, qkv_bias):
    source = hf_model(kind, headless, qkv_bias=qkv_bias)
    native = to_native(source.state_dict())
    shapes = state_dict_shapes(
        tiny_config(attention_type=kind, mlp_ratio=2.5, num_classes=0 if headless else 5, qkv_bias=qkv_bias)
    )
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == shapes
    target = hf_model(kind, headless, qkv_bias=qkv_bias)
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    target.load_state_dict(from_native(native, "huggingface"), strict=True)
    assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("prefixes", [(), *itertools.permutations(("module.", "model.", "_orig_mod."), 2), ("model.",)])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_come_off_in_any_combination(prefixes, kind):
    state = tiny_state(tiny_config(attention_type=kind))
    wrapped = from_native(state, "timesformer", prefix="".join(prefixes))
    assert all(name.startswith("".join(prefixes)) for name in wrapped)
    assert_same(to_native(wrapped), state)
    # Only the original's own prefix tells a space-only model from an image ViT.
    expected = "vit" if kind == "space_only" and "model." not in prefixes else "timesformer"
    assert detect_format(wrapped) == expected


def test_a_prefix_on_some_keys_only_is_no_prefix():
    state = tiny_state(tiny_config())
    mixed = {("model." if "blocks.1." in name else "") + name: tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError) as error:
        to_native(mixed)
    assert all(name in str(error.value) for name in mixed if name.startswith("model."))


@pytest.mark.parametrize("fmt", ["timesformer", "huggingface", "mmaction2", "vit"])
def test_every_unknown_key_is_listed(fmt):
    state = tiny_state(tiny_config(attention_type="space_only"))
    foreign = state if fmt == "vit" else from_native(state, fmt)
    # The junk the original's loader makes and ignores, a block number written twice, and a plain typo.
    bogus = ["blocks.0.temporal_temporal_attn.qkv.weight", "blocks.01.norm1.weight", "heads.weight", "norm.weights"]
    with pytest.raises(CheckpointError) as error:
        to_native(foreign | {name: torch.zeros(1) for name in bogus}, fmt)
    assert all(name in str(error.value) for name in bogus) and "4 unknown" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        from_native(state | {name: torch.zeros(1) for name in bogus}, fmt)
    assert all(name in str(error.value) for name in bogus)


def test_a_vit_has_no_place_for_time():
    with pytest.raises(CheckpointError, match=r"time_embed.*temporal_norm1.*temporal_fc"):
        from_native(tiny_state(tiny_config()), "vit")
    space = tiny_state(tiny_config(attention_type="space_only"))
    assert_same(from_native(space, "vit"), space)


def test_mmaction2_cannot_lack_the_qkv_bias():
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.bias"):
        from_native(tiny_state(tiny_config(qkv_bias=False)), "mmaction2")


def test_tensors_are_passed_on_untouched():
    state = tiny_state(tiny_config(), dtype=torch.bfloat16)
    state["norm.weight"][0] = math.nan
    there = from_native(state, "mmaction2")
    assert all(a is b for a, b in zip(to_native(there).values(), state.values(), strict=True))


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({}, CheckpointError, "no keys at all"),
        ({"layer1.0.conv.weight": torch.zeros(1)}, CheckpointError, r"known format.*layer1\.0\.conv\.weight"),
        ({"blocks.0.norm1.weight": 3, "epoch": 1}, CheckpointError, r"norm1\.weight' \(int\), 'epoch' \(int\)"),
        ([1, 2], TypeError, "got list"),
    ],
    ids=["empty", "resnet", "not-tensors", "not-a-mapping"],
)
def test_what_is_no_state_dict_is_named(state, error, words):
    with pytest.raises(error, match=words):
        detect_format(state)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match="fmt: got 'hf', expected one of 'timesformer', 'huggingface'"):
        to_native(tiny_state(tiny_config()), "hf")


# ---- loading


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_is_exact(kind):
    config = tiny_config(attention_type=kind)
    model, state = Named(config), tiny_state(config)
    load_into(model, state)
    assert_same(model.state_dict(), state)


def test_everything_wrong_is_in_one_error_and_nothing_is_loaded():
    model, state = Named(tiny_config()), tiny_state(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    missing = ["cls_token", "blocks.1.temporal_fc.bias", "head.bias"]
    wrong = {"norm.weight": (65,), "patch_embed.proj.weight": (64, 3, 16, 16), "blocks.0.mlp.fc1.weight": (64, 128)}
    extra = ["blocks.2.norm1.weight", "blocks.2.norm1.bias"]
    for name in missing:
        del state[name]
    state |= {name: torch.zeros(shape) for name, shape in wrong.items()} | {name: torch.zeros(64) for name in extra}
    state["norm.bias"] = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(CheckpointError) as error:
        load_into(model, state)
    text = str(error.value)
    assert all(name in text for name in [*missing, *extra, *wrong])
    assert "norm.weight is (65,), expected (64,)" in text and "norm.bias is torch.int8" in text
    assert "missing (3)" in text and "unexpected (2)" in text and "wrong shape (3)" in text
    assert_same(model.state_dict(), before)


def test_class_count_change(caplog):
    model, state = Named(tiny_config(num_classes=400)), tiny_state(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"(?s)head.weight is \(5, 64\), expected \(400, 64\).*5 classes.*400"):
        load_into(model, state)
    assert_same(model.state_dict(), before)
    with caplog.at_level(logging.WARNING, "timesformer"):
        load_into(model, state, num_classes_change="reinit")
    assert "head re-initialised: 400 classes, untrained; the checkpoint's, with 5 classes" in caplog.text
    head = model.state_dict()["head.weight"]
    assert 0.019 < head.std() < 0.021 and head.abs().mean() == pytest.approx(0.02 * math.sqrt(2 / math.pi), rel=0.02)
    assert not model.state_dict()["head.bias"].any()
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert_same(rest, {name: tensor for name, tensor in state.items() if not name.startswith("head.")})


def test_reinit_keeps_a_head_that_fits_and_serves_headless_models(caplog):
    state = tiny_state(tiny_config())
    model = Named(tiny_config())
    load_into(model, state, num_classes_change="reinit")
    assert_same(model.state_dict(), state)
    body = Named(tiny_config(num_classes=0))
    with pytest.raises(CheckpointError, match="unexpected .*head.weight, head.bias"):
        load_into(body, state)
    load_into(body, state, num_classes_change="reinit")
    assert "the model has no head" in caplog.text
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    assert_same(body.state_dict(), headless)
    with pytest.raises(CheckpointError, match="missing .*head.weight, head.bias"):
        load_into(model, headless)
    load_into(model, headless, num_classes_change="reinit")
    assert not model.state_dict()["head.bias"].any()


@pytest.mark.parametrize("broken", ["head.weight", "head.bias"])
def test_reinit_does_not_excuse_half_a_head(broken):
    state = tiny_state(tiny_config())
    del state[broken]
    with pytest.raises(CheckpointError, match=rf"missing \(1\): {broken}"):
        load_into(Named(tiny_config()), state, num_classes_change="reinit")


def test_a_meta_model_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        load_into(Named(tiny_config()).to("meta"), tiny_state(tiny_config()))


@pytest.mark.parametrize("option", ["num_classes_change", "pos_resize", "time_resize"])
def test_unknown_rules_are_named(option):
    with pytest.raises(ValueError, match=f"{option}: got 'lanczos', expected one of"):
        load_into(Named(tiny_config()), tiny_state(tiny_config()), **{option: "lanczos"})


# ---- resize rules, against formulas written without any interpolation routine


def sampling_matrix(source, target, rule):
    """(target, source) weights of 1-D resampling: nearest, or half-pixel linear / cubic (a = -0.75), edges clamped."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        if rule == "nearest":
            matrix[i, i * source // target] = 1
            continue
        position = (i + 0.5) * source / target - 0.5
        if rule == "bilinear":
            position = max(position, 0.0)
        base = math.floor(position)
        for tap in range(base - 1, base + 3):
            distance = abs(position - tap)
            weight = max(0.0, 1 - distance)
            if rule == "bicubic":
                a = -0.75
                near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
                far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
                weight = near if distance <= 1 else far if distance < 2 else 0.0
            matrix[i, min(max(tap, 0), source - 1)] += weight
    return matrix


@pytest.mark.parametrize("rule", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param((4, 4), (7, 7), id="up"),
        pytest.param((7, 7), (4, 4), id="down"),  # no antialiasing
        pytest.param((4, 4), (3, 5), id="to-rectangle"),
        pytest.param((2, 8), (4, 4), id="same-count-other-aspect"),
        pytest.param((3, 3), (5, 1), id="one-column"),
        pytest.param((1, 1), (3, 2), id="from-one-patch"),
    ],
)
def test_pos_rules_in_two_dimensions(rule, source, target):
    table = torch.randn(1, 1 + source[0] * source[1], 6, dtype=torch.float64)
    got = resize_pos_embed(table, source, target, rule)
    rows, columns = (sampling_matrix(s, t, rule) for s, t in zip(source, target, strict=True))
    grid = table[0, 1:].unflatten(0, source)
    expected = torch.einsum("ip,jq,pqd->ijd", rows, columns, grid).flatten(0, 1)
    assert torch.equal(got[:, 0], table[:, 0])
    torch.testing.assert_close(got[0, 1:], expected, rtol=0, atol=0 if rule == "nearest" else 1e-12)


def test_legacy_rule_runs_over_the_flattened_rows():
    table = torch.randn(1, 1 + 16, 6)
    got = resize_pos_embed(table, (4, 4), (6, 6), "nearest1d_legacy")
    assert torch.equal(got[0, 1:], torch.stack([table[0, 1 + k * 16 // 36] for k in range(36)]))
    assert not torch.equal(got, resize_pos_embed(table, (4, 4), (6, 6), "nearest"))


@pytest.mark.parametrize("rule", ["nearest", "linear"])
@pytest.mark.parametrize(("source", "target"), [(8, 96), (8, 3), (3, 8), (8, 1), (1, 4)])
def test_time_rules(rule, source, target):
    table = torch.randn(1, source, 5, dtype=torch.float64)
    expected = sampling_matrix(source, target, "bilinear" if rule == "linear" else rule) @ table[0]
    got = resize_time_embed(table, target, rule)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=0 if rule == "nearest" else 1e-12)


@pytest.mark.parametrize("rule", ["nearest", "nearest1d_legacy", "bilinear", "bicubic"])
def test_16_bit_tables_are_resized_in_float32(rule):
    table = torch.randn(1, 17, 6).bfloat16()
    got = resize_pos_embed(table, (4, 4), (3, 3), rule)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, resize_pos_embed(table.float(), (4, 4), (3, 3), rule).bfloat16())


def test_load_into_resizes_by_the_named_rules():
    state = tiny_state(tiny_config())
    model = Named(tiny_config(img_size=(48, 16), num_frames=7))
    load_into(model, state, pos_resize="bicubic", time_resize="linear")
    loaded = model.state_dict()
    assert torch.equal(loaded["pos_embed"], resize_pos_embed(state["pos_embed"], (4, 4), (6, 2), "bicubic"))
    assert torch.equal(loaded["time_embed"], resize_time_embed(state["time_embed"], 7, "linear"))
    load_into(model, state)
    loaded = model.state_dict()
    assert torch.equal(loaded["pos_embed"], resize_pos_embed(state["pos_embed"], (4, 4), (6, 2), "nearest"))
    assert torch.equal(loaded["time_embed"], resize_time_embed(state["time_embed"], 7, "nearest"))
    with pytest.raises(CheckpointError, match=r"(?s)pos_resize='error'.*\(6, 2\).*time_resize='error'.* 3 .* 7"):
        load_into(model, state, pos_resize="error", time_resize="error")


def test_rectangular_sources_need_their_grid():
    state = tiny_state(tiny_config(img_size=(48, 16)))
    model = Named(tiny_config())
    with pytest.raises(CheckpointError, match="12 positions, not a square grid: pass source_grid"):
        load_into(model, state)
    load_into(model, state, source_grid=(6, 2))
    expected = resize_pos_embed(state["pos_embed"], (6, 2), (4, 4), "nearest")
    assert torch.equal(model.state_dict()["pos_embed"], expected)
    with pytest.raises(CheckpointError, match=r"source_grid \(5, 2\) does not hold the 12 positions"):
        load_into(model, state, source_grid=(5, 2))


def test_same_token_count_with_another_aspect_is_resized_when_the_grid_is_known():
    state = tiny_state(tiny_config(img_size=(16, 64)))
    model = Named(tiny_config())
    load_into(model, state, source_grid=(2, 8))
    expected = resize_pos_embed(state["pos_embed"], (2, 8), (4, 4), "nearest")
    assert torch.equal(model.state_dict()["pos_embed"], expected)
    load_into(model, state)
    assert torch.equal(model.state_dict()["pos_embed"], state["pos_embed"])


# ---- inflation of image models


@pytest.mark.parametrize("kind", KINDS)
def test_inflation(kind, caplog):
    image = tiny_state(tiny_config(attention_type="space_only", num_classes=1000))
    model = Named(tiny_config(attention_type=kind))
    inflate_vit(image, model)
    loaded = model.state_dict()
    for name, tensor in loaded.items():
        if name == "time_embed" or "temporal_fc" in name or name == "head.bias":
            assert not tensor.any(), name
        elif "temporal_" in name:
            assert torch.equal(tensor, image[name.replace("temporal_", "")]), name
        elif name != "head.weight":
            assert torch.equal(tensor, image[name]), name
    assert loaded["head.weight"].abs().max() < 0.15
    assert "head re-initialised: 5 classes, untrained" in caplog.text


def test_inflation_keeps_the_head_only_when_asked_and_equal():
    image = tiny_state(tiny_config(attention_type="space_only"))
    model = Named(tiny_config())
    inflate_vit(image, model)
    assert not torch.equal(model.state_dict()["head.weight"], image["head.weight"])
    inflate_vit(image, model, keep_head=True)
    assert torch.equal(model.state_dict()["head.weight"], image["head.weight"])
    with pytest.raises(CheckpointError, match="5 classes, the model 7"):
        inflate_vit(image, Named(tiny_config(num_classes=7)), keep_head=True)


def test_inflation_is_strict_and_resizes_positions():
    image = tiny_state(tiny_config(attention_type="space_only"))
    bigger = Named(tiny_config(img_size=48))
    inflate_vit(image, bigger, pos_resize="bilinear")
    expected = resize_pos_embed(image["pos_embed"], (4, 4), (6, 6), "bilinear")
    assert torch.equal(bigger.state_dict()["pos_embed"], expected)
    with pytest.raises(CheckpointError, match="dist_token"):
        inflate_vit(image | {"dist_token": torch.zeros(1, 1, 64)}, bigger)
    before = {name: tensor.clone() for name, tensor in bigger.state_dict().items()}
    del image["blocks.1.norm1.weight"]
    image["norm.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        inflate_vit(image, bigger)
    wanted = ["blocks.1.norm1.weight", "blocks.1.temporal_norm1.weight", "norm.bias is (3,), expected (64,)"]
    assert all(text in str(error.value) for text in wanted)
    assert_same(bigger.state_dict(), before)
