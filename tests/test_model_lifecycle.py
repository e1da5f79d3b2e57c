# SPDX-License-Identifier: Apache-2.0
"""A TimeSformer from construction to file: signature, head, checkpoints, compiler, transforms, hooks, bad input."""

import copy
import importlib
import io
import runpy
from pathlib import Path

import blocks
import pytest
import torch
from blocks import TINY, clip

from timesformer import TimeSformer, TimeSformerConfig

pytestmark = pytest.mark.needs(dtype=torch.float64, device="cpu")  # what the tests of this file ask of a backend

KINDS = ("divided_space_time", "joint_space_time", "space_only")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(generator, kind="divided_space_time", dtype=torch.float64, **options):
    return blocks.randomise(TimeSformer(**{**TINY, "attention_type": kind, **options}).to(dtype), generator).eval()


def test_original_signature_and_import_path():
    original = importlib.import_module("timesformer.models.vit").TimeSformer
    assert original is TimeSformer
    model = original(32, 8, 5, 4, "joint_space_time", "", embed_dim=32, depth=1, num_heads=4)
    assert model.config.attention_type == "joint_space_time" and model.config.num_frames == 4
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "time_embed"}


def test_reset_classifier(generator):
    model = make(generator, dtype=torch.float32, id2label={i: str(i) for i in range(5)}).bfloat16()
    model.reset_classifier(9)
    assert model.config.num_classes == 9 and model.config.id2label is None
    assert model.head.weight.dtype == torch.bfloat16 and not model.head.bias.any()
    assert model(clip(generator, dtype=torch.bfloat16)).shape == (2, 9)
    model.reset_classifier(0)
    assert model(clip(generator, dtype=torch.bfloat16)).shape == (2, 32)


def test_copies_and_files(generator, kind):
    model, video = make(generator, kind), clip(generator)
    exact = model(video)
    assert torch.equal(copy.deepcopy(model)(video), exact)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(video), exact)
    twin = TimeSformer.from_config(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(video), exact)


def test_save_and_load(generator, kind, tmp_path):
    pytest.importorskip("safetensors")
    labels = {i: f"action {i}" for i in range(5)}
    model = make(generator, kind, torch.float32, id2label=labels, preset="k400-base")
    model.save_pretrained(tmp_path / "m")
    loaded = TimeSformer.from_pretrained(tmp_path / "m")
    assert not loaded.training and loaded.config == model.config
    video = clip(generator, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(video), model(video))

    other = TimeSformer.from_pretrained(tmp_path / "m", num_classes=3, num_frames=6, img_size=(16, 48))
    assert other.head.out_features == 3 and other.config.id2label is None and other.config.grid == (2, 6)
    big = clip(generator, 1, 6, 16, 48, torch.float32)
    with torch.no_grad():  # resized at load by the same nearest rule as at run time
        torch.testing.assert_close(other.forward_features(big), model.forward_features(big))
    with pytest.raises(ValueError, match="attention_type: got 'axial'"):
        TimeSformer.from_pretrained(tmp_path / "m", attention_type="axial")


def test_load_at_construction(generator, tmp_path, caplog):
    """pretrained_model= takes over a trained model; another class count starts a new head and says so."""
    model, file = make(generator, dtype=torch.float32), tmp_path / "model.pyth"
    torch.save({"model_state": {f"model.{k}": v for k, v in model.state_dict().items()}}, file)
    with pytest.raises(ValueError, match="num_heads"):
        TimeSformer.from_pretrained(file)  # a bare file of width 32 does not tell
    same = TimeSformer(**TINY, pretrained_model=file).eval()
    video = clip(generator, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(same(video), model(video))
        assert torch.equal(TimeSformer.from_pretrained(file, num_heads=4)(video), model(video))
    with caplog.at_level("INFO", "timesformer"):
        other = TimeSformer(**{**TINY, "num_classes": 8}, pretrained_model=file).eval()
    assert "head re-initialised" in caplog.text and "5 classes" in caplog.text
    with torch.no_grad():
        assert torch.equal(other.forward_features(video), model.forward_features(video))


def test_inflated_image_model(generator, tmp_path):
    """An image ViT at construction: a static clip gives the image model's features."""
    vit = make(generator, "space_only", torch.float32, num_frames=1)
    file = tmp_path / "vit.pth"
    torch.save(vit.state_dict(), file)
    model = TimeSformer(**TINY, pretrained_model=file).eval()
    image = clip(generator, 2, 1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(image.expand(-1, -1, 4, -1, -1)), vit.forward_features(image), rtol=1e-4, atol=1e-5
        )
    whole = TimeSformer.from_pretrained(file, num_heads=4, num_frames=6)
    assert whole.config.attention_type == "divided_space_time" and whole.time_embed.shape == (1, 6, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole(image.expand(-1, -1, 6, -1, -1)), vit(image), rtol=1e-4, atol=1e-5)


@pytest.fixture
def traceable(poison, monkeypatch):
    """The compiler cannot trace the patch that fills new_empty with NaN."""
    with monkeypatch.context() as patch:
        patch.delattr(torch.Tensor, "new_empty")
        yield


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compile(generator, kind, mode):
    torch.compiler.reset()
    model = make(generator, kind, torch.float32, depth=1, drop_path_rate=0.0).train(mode == "train")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video = clip(generator, dtype=torch.float32)
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(compiled(video), model(video), rtol=1e-4, atol=1e-5)
    if mode == "train":
        compiled(video).sum().backward()
        grad = model.cls_token.grad.clone()
        model.zero_grad()
        model(video).sum().backward()
        torch.testing.assert_close(model.cls_token.grad, grad, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("traceable")
def test_compile_with_drop_path_and_another_size(generator):
    torch.compiler.reset()
    model = make(generator, dtype=torch.float32, drop_path_rate=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(clip(generator, dtype=torch.float32)).sum().backward()
    assert compiled(clip(generator, 3, 5, 40, 24, torch.float32)).isfinite().all()


def test_per_sample_gradients(generator):
    """torch.func over the whole model: vmap(grad) equals one backward per clip."""
    model, video = make(generator), clip(generator)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params, sample):
        return torch.func.functional_call(model, params, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, video)
    for i, sample in enumerate(video):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-8, atol=1e-9, msg=f"{name}: {{}}".format)


def test_hidden_states_survive_inference(generator):
    """In-place residuals reuse a branch's memory, never the stream's: hooks may keep what they see."""
    model, seen = make(generator), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append((args[0], args[0].clone(), out, out.clone())))
    with torch.no_grad():
        model(clip(generator))
    assert len(seen) == 2 and all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in seen)


def test_a_hook_sees_every_token(generator, kind):
    """The last block computes its class row alone, but not under the eyes of a hook; the logits are the same."""
    model, video, shapes = make(generator, kind), clip(generator), []
    with torch.no_grad():
        exact = model(video)
    rows = model.blocks[1](model._embed(video).sum(), 1 if kind == "space_only" else 4).shape[1]
    hook = model.blocks[1].mlp.register_forward_hook(lambda m, args, out: shapes.append(out.shape[1]))
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(model(video), exact, rtol=1e-10, atol=1e-11)
    assert shapes == [rows, rows] and rows > 1
    hook.remove()
    outputs, attention = [], model.blocks[1].attn
    forward = attention.forward
    attention.forward = lambda *args, **options: outputs.append(forward(*args, **options)) or outputs[-1]
    model(video)
    assert outputs[0].shape[1] == 1


def test_empty_batch(backend, generator, kind):
    model = make(generator, kind, backend=backend)
    assert model(clip(generator, 0)).shape == (0, 5)
    with torch.no_grad():
        assert model(clip(generator, 0)).shape == (0, 5)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "video, error, words",
    [
        pytest.param(torch.zeros(3, 4, 32, 32), ValueError, ["(3, 4, 32, 32)", "(batch, 3, frames"], id="rank"),
        pytest.param(
            torch.zeros(1, 4, 3, 32, 32), ValueError, ["(1, 4, 3, 32, 32)", "(batch, 3, frames"], id="channels"
        ),
        pytest.param(torch.zeros(1, 3, 4, 33, 32), ValueError, ["33", "height a multiple of 8"], id="height"),
        pytest.param(torch.zeros(1, 3, 4, 32, 36), ValueError, ["36", "width a multiple of 8"], id="width"),
        pytest.param(torch.zeros(1, 3, 0, 32, 32), ValueError, ["0", "at least one frame"], id="no-frames"),
        pytest.param(torch.zeros(1, 3, 4, 0, 32), ValueError, ["(1, 3, 4, 0, 32)"], id="no-pixels"),
        pytest.param(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), ValueError, ["uint8", "floating"], id="integer"),
        pytest.param(torch.zeros(1, 3, 4, 32, 32).half(), ValueError, ["float16", "float32"], id="other-dtype"),
        pytest.param([0.0], TypeError, ["list", "Tensor"], id="list"),
    ],
)
def test_bad_video(kind, video, error, words):
    with pytest.raises(error) as caught:
        TimeSformer(**TINY, attention_type=kind)(video)
    assert str(caught.value).startswith("video: got") and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("img_size", 30, ValueError),
        ("img_size", (32, 32, 32), ValueError),
        ("patch_size", 0, ValueError),
        ("num_frames", 0, ValueError),
        ("num_classes", -1, ValueError),
        ("num_classes", 2.0, TypeError),
        ("depth", True, TypeError),
        ("attention_type", "axial", ValueError),
        ("num_heads", 5, ValueError),
        ("mlp_ratio", 0, ValueError),
        ("drop_rate", 1.0, ValueError),
        ("drop_path_rate", -0.1, ValueError),
    ],
)
def test_bad_configuration(field, value, error):
    with pytest.raises(error, match=f"{field}: got .*expected"):
        TimeSformer(**{**TINY, field: value})


def test_configuration_round_trip():
    config = TimeSformerConfig(img_size=(32, 64), id2label={0: "a", 1: "b"}, num_classes=2)
    assert TimeSformerConfig.from_dict(config.to_dict()) == config
    loose = {**config.to_dict(), "img_size": [32, 64], "id2label": {"0": "a", "1": "b"}}  # as JSON has it
    assert TimeSformerConfig.from_dict(loose) == config
    with pytest.raises(ValueError, match="config: unknown fields colour, depht"):
        TimeSformerConfig.from_dict({"depht": 3, "colour": 1})


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'cudnn', expected one of auto"):
        TimeSformer(**TINY, backend="cudnn")


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_example_of_the_layer(capsys):
    runpy.run_path(str(EXAMPLES / "divided_attention.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "(2, 192)" in out and float(out.split()[-1]) > 0


def test_example_of_the_model(generator, tmp_path, capsys):
    """On a small model and a short film of its own."""
    for package in ("av", "safetensors"):
        pytest.importorskip(package)
    from timesformer.video import write_video

    make(generator, dtype=torch.float32, preset="k400-base").save_pretrained(tmp_path / "model")
    write_video(tmp_path / "film.mp4", torch.randint(0, 255, (12, 48, 64, 3), dtype=torch.uint8).numpy(), 30)
    main = runpy.run_path(str(EXAMPLES / "video_features.py"))["main"]
    main(str(tmp_path / "film.mp4"), str(tmp_path / "model"))
    out = capsys.readouterr().out
    assert "features (3, 32)" in out and "class" in out
