# SPDX-License-Identifier: Apache-2.0
"""TimeSformer against the independent model of blocks.py at any size; parameter counts, initialisation, dropout."""

import copy
import math

import blocks
import pytest
import torch
from blocks import TINY, clip

from timesformer import TimeSformer
from timesformer_kernels import registry

pytestmark = pytest.mark.needs(dtype=torch.float64, device="cpu")  # what the tests of this file ask of a backend

KINDS = ("divided_space_time", "joint_space_time", "space_only")
EXACT = dict(rtol=1e-10, atol=1e-11)

with torch.device("meta"):
    torch.empty(0)  # torch notes the factory functions once, and must see them before conftest wraps them


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(generator, kind="divided_space_time", dtype=torch.float64, **options):
    return blocks.randomise(TimeSformer(**{**TINY, "attention_type": kind, **options}).to(dtype), generator).eval()


# --- against the independent model -----------------------------------------------------------------------------------


def test_logits_and_gradients(backend, generator, kind):
    model, video = make(generator, kind, backend=backend), clip(generator).requires_grad_()
    p, oracle_video = blocks.parameters_of(model), video.detach().clone().requires_grad_()
    exact = blocks.timesformer(p, oracle_video, model.config.grid, 4, kind)
    out, weight = model(video), clip(generator).flatten()[:10].view(2, 5)
    torch.testing.assert_close(out, exact, **EXACT)
    (out * weight).sum().backward()
    (exact * weight).sum().backward()
    torch.testing.assert_close(video.grad, oracle_video.grad, **EXACT)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, msg=f"{name}: {{}}".format, **EXACT)


@pytest.mark.parametrize(
    "frames, height, width",
    [
        pytest.param(4, 32, 32, id="own-size"),
        pytest.param(1, 32, 32, id="one-frame"),
        pytest.param(9, 32, 32, id="more-frames"),
        pytest.param(3, 48, 24, id="rectangle"),
        pytest.param(
            4, 16, 64, id="same-count-other-aspect"
        ),  # 2 x 8 for 4 x 4: the original leaves its table as it is
        pytest.param(2, 40, 8, id="width-of-one-patch"),  # breaks the original
        pytest.param(5, 8, 8, id="one-patch"),
    ],
)
def test_sizes_at_run_time(generator, kind, frames, height, width):
    model, video = make(generator, kind), clip(generator, 2, frames, height, width)
    exact = blocks.timesformer(blocks.parameters_of(model), video, (4, 4), 4, kind)
    torch.testing.assert_close(model(video), exact, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(video), exact, **EXACT)


def test_rectangular_model(generator, kind):
    model = make(generator, kind, img_size=(24, 40), patch_size=(8, 4))
    assert model.config.grid == (3, 10) and model.pos_embed.shape == (1, 31, 32)
    p = blocks.parameters_of(model)
    for height, width in ((24, 40), (16, 12)):
        video = clip(generator, 2, 3, height, width)
        torch.testing.assert_close(model(video), blocks.timesformer(p, video, (3, 10), 4, kind), **EXACT)


def test_position_table_is_resized_in_two_dimensions(generator):
    """Distinct rows, grown from 2 x 2 to 4 x 6: each patch reads the row of the quarter it lies in."""
    model = make(generator, img_size=16, patch_size=8)
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(5.0).view(1, 5, 1).expand(1, 5, 32))
        model.patch_embed.proj.bias.zero_()
        rows = model._table((4, 6), 3, with_time=False)[1:, 0].view(4, 6, 3)
    quarters = torch.tensor([[1.0, 1, 1, 2, 2, 2]] * 2 + [[3.0, 3, 3, 4, 4, 4]] * 2, dtype=torch.float64)
    assert torch.equal(rows, quarters[..., None].expand(4, 6, 3))


def test_non_contiguous_video(generator, kind):
    model = make(generator, kind)
    video = clip(generator, 2, 4).transpose(1, 2).contiguous().transpose(1, 2)  # frames first in memory
    assert not video.is_contiguous()
    torch.testing.assert_close(model(video), model(video.contiguous()))
    torch.testing.assert_close(model(video.flip(4)), model(video.flip(4).contiguous()))


def test_features_and_options(generator, kind):
    options = dict(qkv_bias=False, qk_scale=0.3, mlp_ratio=2.5, layer_norm_eps=1e-3)
    model = make(generator, kind, num_classes=0, **options)
    assert isinstance(model.head, torch.nn.Identity) and not any("head" in name for name in model.state_dict())
    video = clip(generator)
    features = model.forward_features(video)
    assert features.shape == (2, 32) and torch.equal(model(video), features)
    assert model.blocks[0].mlp.fc1.out_features == 80 and model.blocks[1].attn.scale == 0.3
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}
    normal = (features - model.norm.bias) / model.norm.weight
    torch.testing.assert_close(normal.mean(1), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.15), (torch.float16, 0.02)], ids=str
)
def test_dtypes(backend, generator, dtype, error):
    model = make(generator, num_frames=3)
    video = clip(generator, 2, 3, 24, 24)
    exact = model(video)
    low = copy.deepcopy(model).to(dtype)
    low.set_backend(backend)
    with torch.no_grad():
        out = low(video.to(dtype))
    assert out.dtype == dtype and (out - exact).abs().max() < error * exact.abs().max()


def test_autocast_keeps_the_residual_stream_wide(generator):
    model, video = make(generator, dtype=torch.float32), clip(generator, dtype=torch.float32)
    widths = []
    model.blocks[0].register_forward_hook(lambda m, args, out: widths.append((args[0].dtype, out.dtype)))
    exact = model(video)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(video)
        with torch.no_grad():
            torch.testing.assert_close(model(video), logits, rtol=0, atol=0.05)
    assert set(widths) == {(torch.float32, torch.float32)}
    assert (logits - exact).abs().max() < 0.15 * exact.abs().max()


def test_backends_agree(generator, kind):
    if reason := registry.get("cpp").why_not("cpu", torch.float32, 8):
        pytest.skip(f"cpp: {reason}")
    model, video = make(generator, kind, torch.float32), clip(generator, dtype=torch.float32)
    out = {}
    for name in ("reference", "cpp"):
        model.set_backend(name)
        assert {block.backend for block in model.blocks} == {name}
        out[name] = model(video)
    torch.testing.assert_close(out["cpp"], out["reference"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(out["cpp"], out["reference"])  # two programs, not one


# --- what the architecture promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, classes, count",
    [
        ("divided_space_time", 400, 121_566_352),
        ("joint_space_time", 400, 86_112_400),
        ("space_only", 400, 86_106_256),
        ("divided_space_time", 174, 121_392_558),
        ("divided_space_time", 1059, 122_073_123),
        ("joint_space_time", 174, 85_938_606),
    ],
)
def test_parameter_counts(kind, classes, count):
    with torch.device("meta"):
        model = TimeSformer(num_classes=classes, attention_type=kind)
        assert model(torch.empty(1, 3, 8, 224, 224)).shape == (1, classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_static_clip_is_an_image(generator):
    """Without time (temporal_fc = time_embed = 0) a clip of equal frames is the image ViT's image."""
    model = make(generator)
    with torch.no_grad():
        model.time_embed.zero_()
        for block in model.blocks:
            block.temporal_fc.weight.zero_()
            block.temporal_fc.bias.zero_()
    image = clip(generator)[:, :, 0]
    exact = blocks.image_vit(blocks.parameters_of(model), image, (4, 4), 4)
    torch.testing.assert_close(model(image[:, :, None].expand(-1, -1, 5, -1, -1)), exact, **EXACT)


def test_frame_order_is_seen_through_the_time_embedding_alone(generator, kind):
    model, video = make(generator, kind), clip(generator)
    shuffled = video[:, :, [2, 0, 3, 1]]
    if kind != "space_only":
        assert (model(video) - model(shuffled)).abs().max() > 1e-3
        with torch.no_grad():
            model.time_embed.zero_()
    torch.testing.assert_close(model(shuffled), model(video), **EXACT)


def test_initialisation(kind):
    torch.manual_seed(0)
    model = TimeSformer(64, 8, 50, 4, kind, embed_dim=128, depth=2, num_heads=2)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, name.endswith("weight"))), name
        elif name == "time_embed" or "temporal_fc" in name:
            assert not p.any(), name
        elif name.startswith("patch_embed"):  # PyTorch's: uniform within 1 / sqrt(fan in)
            bound = (3 * 8 * 8) ** -0.5
            assert p.abs().max() <= bound and (p.dim() == 1 or abs(p.std() - bound / math.sqrt(3)) < 0.03 * bound), name
        elif p.dim() == 1:
            assert not p.any(), name  # biases of every Linear
        else:
            count = p.numel()
            assert abs(p.std() / 0.02 - 1) < 5 / math.sqrt(2 * count), name
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(count) and p.abs().max() < 0.12, name
            # A normal distribution cut at two standard deviations, not at +-2, would end here.
            assert count < 5000 or p.abs().max() > 0.05, name


def test_drop_path_rates(kind):
    with torch.device("meta"):
        model = TimeSformer(attention_type=kind)
        flat = TimeSformer(attention_type=kind, depth=1, drop_path_rate=0.3)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 12).tolist())
    assert flat.blocks[0].drop_path.rate == 0


def test_mlp_drop_path_drops_clips(generator):
    """Attention branches off, rate 1/2 in the second block: its MLP is added doubled, or not at all."""
    torch.manual_seed(0)
    model = make(generator, drop_path_rate=0.5).train()
    block, x = model.blocks[1], torch.randn(64, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        for layer in (block.temporal_fc, block.attn.proj):
            layer.weight.zero_()
            layer.bias.zero_()
        gain = block(x, 4) - x
        full = 2 * (blocks.mlp(blocks.parameters_of(block), "", x) - x)
    kept = gain.flatten(1).any(1)
    torch.testing.assert_close(gain, full * kept[:, None, None], **EXACT)
    assert 16 < kept.sum() < 48


def test_dropout_places(generator, kind):
    """Rate 1/2 on patch plus position, again after the time embedding; the class row meets the first alone."""
    torch.manual_seed(0)
    model, video = make(generator, kind, drop_rate=0.5), clip(generator, 64)
    exact = model._embed(video).sum()
    tokens = model.train()._embed(video).sum()
    row = torch.stack([0 * exact[:, 0], 2 * exact[:, 0]], 1)
    hits = (tokens[:, None, 0] - row).abs() < 1e-12
    assert (hits.sum(1) == 1).all() and abs(hits[:, 1].double().mean() - 0.5) < 0.05
    if kind == "space_only":
        cases = torch.stack([0 * exact, 2 * exact])
        shares = (0.5, 0.5)
    else:
        time = model._time(4).repeat(16, 1)
        still = exact[:, 1:] - time
        cases = torch.stack([0 * still, 2 * time.expand_as(still), 2 * (2 * still + time)])
        tokens, shares = tokens[:, 1:], (0.5, 0.25, 0.25)
    hits = (tokens - cases).abs() < 1e-12
    assert (hits.sum(0) == 1).all()
    assert hits.flatten(1).double().mean(1).tolist() == pytest.approx(shares, abs=0.02)


def test_dropout_trains_on_the_reference_alone(generator, kind):
    model = make(generator, kind, drop_rate=0.1, attn_drop_rate=0.1).train()
    model(clip(generator)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.set_backend("cpp")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: attn_drop"):
        model(clip(generator))
