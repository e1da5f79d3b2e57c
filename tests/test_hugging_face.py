# SPDX-License-Identifier: Apache-2.0
"""One line over Hugging Face's TimeSformer: same outputs, gradients and habits, and really through our kernels."""

import copy
import pickle
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import CLASSES, FRAMES, assert_same, clip, make, run  # noqa: E402

from timesformer.integrations import accelerate_transformers, restore  # noqa: E402
from timesformer.integrations.hugging_face import _library  # noqa: E402
from timesformer_kernels import registry  # noqa: E402

# Attention kernels behind the logits of three layers: time and space, but for the last layer's class row (`class_row`).
LOGITS = 5


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the C++ backend; without its library those of the reference."""
    name = "cpp" if registry.get("cpp").why_not("cpu", torch.float64, 8) is None else "reference"
    counts = {"forward": 0}
    backend = registry.get(name)

    def counted(*args, **kwargs):
        counts["forward"] += 1
        return backend.forward(*args, **kwargs)

    monkeypatch.setitem(registry._BACKENDS, name, replace(backend, forward=counted))
    registry.resolve.cache_clear()
    yield counts
    registry.resolve.cache_clear()


@pytest.fixture
def everywhere():
    yield
    restore()


@pytest.mark.parametrize("kind", ["divided_space_time", "joint_space_time"])
def test_same_outputs_and_gradients_through_our_kernels(kind, calls):
    model = make(kind)
    expected = run(model, clip())
    assert calls["forward"] == 0
    assert accelerate_transformers(model) is model
    assert_same(run(model, clip()), expected)
    assert calls["forward"] == 3 * (2 if kind == "divided_space_time" else 1) - 1
    with torch.no_grad():
        assert (model(clip()).logits - expected["logits"]).abs().max() <= 1e-11 * expected["logits"].abs().max()


def test_float32_is_within_1e_5_of_scale():
    model = make().float()
    with torch.no_grad():
        expected = model(clip().float()).logits
        got = accelerate_transformers(model)(clip().float()).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_parameters_and_their_names_stay():
    model = make()
    before = {name: parameter for name, parameter in model.named_parameters()}
    accelerate_transformers(model)
    assert {name: parameter for name, parameter in model.named_parameters()} == before
    assert [type(module).__name__ for module in model.modules()] == [type(m).__name__ for m in make().modules()]


def test_restore(calls):
    model = make()
    expected = run(model, clip())
    restore(accelerate_transformers(model))
    assert_same(run(model, clip()), expected, 0.0)
    assert calls["forward"] == 0
    assert type(model.timesformer.encoder.layer[0]) is _library().layer


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_class_for_models_built_before_and_after(when, calls, everywhere):
    old = make()
    expected = run(old, clip())
    if when == "before":
        model = old
        assert accelerate_transformers() is None
    else:
        accelerate_transformers()
        model = make()
    assert_same(run(model, clip()), expected)
    assert calls["forward"] == LOGITS
    restore()
    assert_same(run(model, clip()), expected, 0.0)
    assert calls["forward"] == LOGITS
    assert transformers.TimesformerForVideoClassification.forward is _library().classifier_forward


def test_attention_probabilities_come_from_the_library(calls):
    model = make()
    expected = model(clip(), output_attentions=True, output_hidden_states=True)
    accelerate_transformers(model)
    got = model(clip(), output_attentions=True, output_hidden_states=True)
    assert calls["forward"] == 0
    assert len(got.attentions) == 3 and all(map(torch.equal, got.attentions, expected.attentions))
    plain = model(clip(), output_hidden_states=True)
    assert calls["forward"] == 6
    for ours, theirs in zip(plain.hidden_states, expected.hidden_states, strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


@pytest.mark.parametrize("dropout", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_dropout_in_training_is_the_librarys(dropout, calls):
    model = make(**{dropout: 0.3}).train()
    torch.manual_seed(5)
    expected = run(model, clip())
    accelerate_transformers(model)
    torch.manual_seed(5)
    assert_same(run(model, clip()), expected, 0.0)
    assert calls["forward"] == 0
    model.eval()(clip())
    assert calls["forward"] == LOGITS


def test_stochastic_depth_draws_the_same(calls):
    model = make(drop_path_rate=0.4).train()
    torch.manual_seed(1)
    expected = run(model, clip(batch=6))
    accelerate_transformers(model)
    torch.manual_seed(1)
    assert_same(run(model, clip(batch=6)), expected, 1e-6)  # the frames' weights of the class row are float32
    assert calls["forward"] == LOGITS
    torch.manual_seed(2)
    assert (run(model, clip(batch=6))["logits"] - expected["logits"]).abs().max() > 1e-6  # it acts


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_still_recomputes(calls, reentrant):
    model = make().train()
    expected = run(model, clip())
    accelerate_transformers(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(model, clip()), expected)
    assert calls["forward"] == 12  # every layer twice


def test_an_activation_we_lack_is_the_librarys(calls):
    model = make(hidden_act="relu")
    expected = run(model, clip())
    assert_same(run(accelerate_transformers(model), clip()), expected, 0.0)
    assert calls["forward"] == 0


def test_hooks_inside_a_layer_see_what_they_saw(calls):
    model = accelerate_transformers(make())
    seen = []
    inner = model.timesformer.encoder.layer[1].attention
    handle = inner.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    model(clip())
    assert seen and calls["forward"] == LOGITS - 2  # one of three layers ran on its own
    handle.remove()
    model(clip())
    assert len(seen) == 1 and calls["forward"] == LOGITS - 2 + LOGITS


def test_modules_put_in_later_are_used():
    model = accelerate_transformers(make())
    before = model(clip()).logits
    layer = model.timesformer.encoder.layer[0]
    with torch.no_grad():
        other = torch.nn.Linear(32, 96).double()
        layer.temporal_attention.attention.qkv = other
        expected = restore(copy.deepcopy(model))(clip()).logits
        got = model(clip()).logits
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert (got - before).abs().max() > 1e-6


def test_lora(calls):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).double()
    model.eval()
    video = clip()
    expected = model(video).logits
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    accelerate_transformers(model)
    logits = model(video).logits
    logits.sum().backward()
    assert calls["forward"] == 6 and len(grads) == 12
    assert (logits - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert_same({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, grads)


@pytest.mark.parametrize("frames", [2, 4, 6])
def test_clips_of_another_length_become_right(frames, calls):
    """Right: what a model whose config has that number of frames gives, with the same weights and a resized table."""
    model = make()
    right = make()
    right.config.num_frames = frames
    video = clip(frames)
    with torch.no_grad():
        expected = right(video, output_attentions=True, output_hidden_states=True)
        stock = model(video).logits
        accelerate_transformers(model)
        assert (model(video).logits - stock).abs().max() <= 1e-11 * stock.abs().max()  # wrong as ever
        accelerate_transformers(model, fix_num_frames=True)
        before = calls["forward"]
        got = model(video, output_hidden_states=True)
        assert calls["forward"] == before + 6
        for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()
        maps = model(video, output_attentions=True).attentions
        assert all(map(torch.equal, maps, expected.attentions))
        short = model(video, return_dict=False)  # nothing but the logits is asked for: layers are merged
    assert isinstance(short, tuple) and len(short) == 1
    assert (short[0] - expected.logits).abs().max() <= 1e-11 * expected.logits.abs().max()
    assert (got.logits - expected.logits).abs().max() <= 1e-11 * expected.logits.abs().max()
    assert frames == FRAMES or (stock - expected.logits).abs().max() > 1e-3 * stock.abs().max()


def test_fixed_frames_with_gradient_checkpointing():
    right = make().train()
    right.config.num_frames = 6
    expected = run(right, clip(6))
    model = accelerate_transformers(make().train(), fix_num_frames=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, clip(6)), expected)


def test_compiles_without_a_graph_break():
    model = make().float()
    video = clip().float()
    with torch.no_grad():
        expected = model(video).logits
        compiled = torch.compile(accelerate_transformers(model), backend="aot_eager", fullgraph=True)
        got = compiled(video).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_copies_and_pickles(calls):
    model = accelerate_transformers(make(), fix_num_frames=True)
    with torch.no_grad():
        expected = model(clip(6)).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(again(clip(6)).logits, expected)
            for parameter in again.parameters():
                parameter.mul_(2)  # the copy's own
            assert not torch.equal(again(clip(6)).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(clip(6)).logits, expected)


def test_a_named_backend(calls):
    model = accelerate_transformers(make(), backend="reference")
    model(clip())
    assert calls["forward"] in (0, 6)  # 6 where the reference is what is counted
    accelerate_transformers(model, backend="auto")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        if registry.get("triton").why_not("cpu", torch.float64, 8) is None:
            pytest.skip("Triton interprets")
        accelerate_transformers(model, backend="triton")(clip())


def test_bad_input():
    with pytest.raises(ValueError, match="model: got Linear, expected one with Hugging Face's TimesformerLayer"):
        accelerate_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of auto"):
        accelerate_transformers(make(), backend="fast")
    model = make()
    layer = model.timesformer.encoder.layer[0]
    layer.__class__ = type("FSDPTimesformerLayer", (type(layer),), {})
    with pytest.raises(RuntimeError, match="model: has a FSDPTimesformerLayer; accelerate the model before"):
        accelerate_transformers(model)


def test_trainer(tmp_path, calls):
    pytest.importorskip("accelerate")

    def trained(model):
        data = [{"pixel_values": clip(batch=1)[0].float() * (i + 1), "labels": i % CLASSES} for i in range(4)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
            learning_rate=1e-3, seed=3, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=data).train()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    expected = trained(make().float())
    assert calls["forward"] == 0
    got = trained(accelerate_transformers(make().float()))
    assert calls["forward"] == 3 * LOGITS
    for name, exact in expected.items():
        assert (got[name] - exact).abs().max() <= 2e-3 * exact.abs().max(), name


def test_example(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples/hugging_face.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split("differ by ")[1].split()[0]) < 1e-5
