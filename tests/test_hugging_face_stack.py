# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's stack of layers run as our own model's: what is merged or left out, and who still sees everything."""

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import FRAMES, clip, make, run  # noqa: E402

from timesformer.integrations import accelerate_transformers, restore  # noqa: E402
from timesformer.model import DividedBlock  # noqa: E402

PLACES = ["timesformer", "timesformer.encoder", "timesformer.encoder.layer.2", "timesformer.layernorm"]
PLACES += ["timesformer.encoder.layer.0", "timesformer.encoder.layer.2.attention.output.dense"]


@pytest.fixture
def asked(monkeypatch):
    """Whether each of our blocks was asked for the class row alone, call by call."""
    found = []
    run = DividedBlock.run

    def recorded(self, stream, frames, class_row_only=False):
        found.append(class_row_only)
        return run(self, stream, frames, class_row_only)

    monkeypatch.setattr(DividedBlock, "run", recorded)
    return found


def test_a_classifier_needs_the_class_row_of_the_last_layer(asked):
    """A model that is called itself gives every row; so does a classifier that is asked for hidden states."""
    model = make()
    with torch.no_grad():
        expected = model(clip(), output_hidden_states=True)
        rows = model.timesformer(clip()).last_hidden_state
        accelerate_transformers(model)
        labelled = model(clip(), labels=torch.tensor([1, 3]))
        assert asked == [False, False, True]
        assert (labelled.logits - expected.logits).abs().max() <= 1e-11 * expected.logits.abs().max()
        loss = torch.nn.functional.cross_entropy(labelled.logits, torch.tensor([1, 3]))
        assert labelled.loss == loss and labelled.hidden_states is None
        assert torch.equal(model(clip(), return_dict=False)[0], labelled.logits)
        got = model.timesformer(clip()).last_hidden_state
        assert got.shape == rows.shape and (got - rows).abs().max() <= 1e-11 * rows.abs().max()
        asked.clear()
        states = model(clip(), output_hidden_states=True).hidden_states
    assert asked == [False] * 3 and states[-1].shape == expected.hidden_states[-1].shape


@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_every_row(place, asked):
    """Forward hooks anywhere along the way get what the library gives them."""
    seen = []

    def look(module, args, out):
        seen.append(out if torch.is_tensor(out) else out[0])

    model = make()
    model.get_submodule(place).register_forward_hook(look)
    with torch.no_grad():
        expected = model(clip()).logits
        got = accelerate_transformers(model)(clip()).logits
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()
    theirs, ours = seen
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()
    assert (True in asked) == (place == "timesformer.encoder.layer.0")


def test_backward_hooks_inside_a_layer_are_called():
    model = accelerate_transformers(make())
    gradients = []
    inner = model.timesformer.encoder.layer[2].attention
    inner.register_full_backward_hook(lambda module, before, after: gradients.append(after[0].abs().max().item()))
    run(model, clip())
    assert len(gradients) == 1 and gradients[0] > 0


def test_a_forward_of_its_own_is_called():
    """As device maps and offloading put it into a layer: wrapped around the library's, before or after."""
    for late in (False, True):
        model = make()
        with torch.no_grad():
            expected = model(clip()).logits
            accelerate_transformers(model) if late else None
            layer = model.timesformer.encoder.layer[2]
            inner, entered = layer.forward, []
            layer.forward = lambda x, output_attentions=False: (entered.append(x.shape[1]), inner(x))[1]  # noqa: B023
            got = accelerate_transformers(model)(clip()).logits
        assert entered == [1 + 16 * FRAMES]
        assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_a_classifier_of_ones_own(asked):
    """A subclass keeps its forward, and reads the rows that it likes."""

    class MeanOfPatches(transformers.TimesformerForVideoClassification):
        def forward(self, pixel_values):
            return self.classifier(self.timesformer(pixel_values).last_hidden_state[:, 1:].mean(1))

    model = MeanOfPatches(make().config).double().eval()
    model.load_state_dict(make().state_dict())
    with torch.no_grad():
        expected = model(clip())
        got = accelerate_transformers(model)(clip())
    assert asked == [False] * 3 and (got - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert type(restore(model)) is MeanOfPatches


@pytest.mark.parametrize("part", ["", "timesformer"], ids=["classifier", "model"])
def test_signatures_stay(part):
    """Trainer reads from a forward's signature which columns of a data set it takes, and how the loss is averaged."""
    model = make()
    expected = inspect.signature(model.get_submodule(part).forward)
    assert inspect.signature(accelerate_transformers(model).get_submodule(part).forward) == expected
