# SPDX-License-Identifier: Apache-2.0
"""The recipe against its description, the loop against one written out here, and what a user gets from the command."""

import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import CLASSES, TINY, metrics, small, train, videos, weights

from timesformer import TimeSformer
from timesformer.presets import find_preset
from timesformer.train import DrawnClips, Recipe, Trainer
from timesformer.train.data import VideoClips, parts_of, stream
from timesformer.train.folders import read_folder
from timesformer.video import clip_views, kinetics, probe, read_frames
from timesformer.video.transforms import train_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = videos(tmp_path_factory.mktemp("data"), "train")
    return videos(folder, "val", per_class=2, seed=1)


def tiny(**options):
    torch.manual_seed(0)
    sizes = {**TINY, "img_size": 16, "num_frames": 2, "num_classes": 4, **options}
    return TimeSformer(**sizes)


def drawn(length=12):
    return DrawnClips("direction", replace(find_preset("miniature"), img_size=16, num_frames=2), length, held_out=5)


# recipe


def test_the_default_recipe_is_the_original():
    """SGD, Nesterov, momentum 0.9, decay 1e-4 on everything; 0.005 x 1, .1, .01 from epochs 0, 11, 14 of 15."""
    recipe, clips = Recipe(), 640
    optimiser = recipe.make_optimiser(tiny())
    (group,) = optimiser.param_groups
    assert isinstance(optimiser, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    assert (recipe.batch_size, recipe.epochs, recipe.steps(clips)) == (64, 15, 150)
    rates = [recipe.lr_at(epoch * 10 + step, clips) for epoch in range(15) for step in (0, 9)]
    expected = [0.005] * 22 + [0.0005] * 6 + [0.00005] * 2
    assert rates == pytest.approx(expected, rel=1e-12)


def test_cosine_and_warmup():
    recipe = Recipe(batch_size=8, schedule="cosine", warmup=4, lr=0.1, epochs=2)
    assert recipe.steps(80) == 20
    for step in range(20):
        expected = 0.1 * (1 + math.cos(math.pi * step / 20)) / 2 * min(1, (step + 1) / 4)
        assert recipe.lr_at(step, 80) == pytest.approx(expected, rel=1e-12)


def test_adamw_spares_tables_and_vectors():
    model = tiny()
    optimiser = Recipe(optimiser="adamw", decay_all=False, weight_decay=0.1).make_optimiser(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(p)] for group in optimiser.param_groups if group["weight_decay"] == 0.1 for p in group["params"]
    }
    spared = {names[id(p)] for group in optimiser.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {"pos_embed", "time_embed", "cls_token", "norm.weight", "head.bias"} <= spared
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.temporal_fc.weight"} <= decayed


@pytest.mark.parametrize("values, message", [
    ({"batch_size": 10, "micro_batch": 4}, "batch_size: got 10, expected a multiple of micro_batch = 4"),
    ({"lr": 0.0}, "lr: got 0.0"),
    ({"lr": math.nan}, "lr: got nan"),
    ({"optimiser": "lion"}, "optimiser: got 'lion', expected one of sgd, adamw"),
    ({"amp": "int8"}, "amp: got 'int8'"),
    ({"warmup": -1}, "warmup: got -1"),
    ({"label_smoothing": 1.0}, "label_smoothing: got 1.0"),
])  # fmt: skip
def test_recipes_check_their_values(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Recipe(**values)


# the stream of clips


class Numbers:
    """A source whose clips are their own number and seed."""

    preset = find_preset("miniature")
    classes = ("a", "b")

    def __len__(self):
        return 10

    def train(self, index, seed):
        return torch.tensor([float(index)]), seed % 2**31, []


def numbers(recipe, start, stop, **options):
    return [batch.clips[:, 0].tolist() for batch in stream(Numbers(), recipe, start, stop, **options)]


def test_every_epoch_holds_every_clip_once_in_another_order():
    recipe = Recipe(batch_size=4, micro_batch=2, epochs=3)
    flat = [number for part in numbers(recipe, 0, recipe.steps(10)) for number in part]
    assert len(flat) == 32  # 30 clips in steps of 4, the last one reaches into epoch 4
    epochs = [flat[0:10], flat[10:20], flat[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    other = [n for part in numbers(Recipe(batch_size=4, micro_batch=2, seed=1), 0, 2) for n in part]
    assert other != flat[:8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_the_middle_goes_on_as_the_whole(workers):
    recipe = Recipe(batch_size=4, micro_batch=2, epochs=3)
    whole = list(stream(Numbers(), recipe, 0, 8))
    rest = list(stream(Numbers(), recipe, 5, 8, workers=workers))
    assert len(rest) == 6
    for ours, theirs in zip(rest, whole[10:], strict=True):
        assert torch.equal(ours.clips, theirs.clips) and torch.equal(ours.labels, theirs.labels)


def test_processes_share_the_parts_of_a_step():
    recipe = Recipe(batch_size=8, micro_batch=2)
    whole = numbers(recipe, 0, 2)
    first, second = (numbers(recipe, 0, 2, rank=rank, world=2) for rank in range(2))
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == whole
    with pytest.raises(ValueError, match="are 4 parts, which 3 processes cannot share evenly"):
        parts_of(recipe, 0, 3)


def test_clips_of_videos_follow_the_original_recipe(data):
    """Kinetics sampling, then scale, crop and flip of the preset, resized after normalisation, all from one seed."""
    preset = replace(find_preset("k400-base"), img_size=16, num_frames=2, rate=3, train_scale=(18, 22))
    source = VideoClips(read_folder(data, "train"), preset)
    path, label = source.folder.clips[4]
    info = probe(path)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        frames = read_frames(path, kinetics(info.frames, info.fps, 2, 3, generator=generator), info=info)
        expected = train_clip(
            torch.from_numpy(frames), size=16, mean=(0.45,) * 3, std=(0.225,) * 3, scale=(18, 22), flip=0.5,
            rule="original", generator=generator,
        )  # fmt: skip
        clip, found, problems = source.train(4, seed)
        assert torch.equal(clip, expected) and (found, problems) == (label, []) == (1, [])
    assert len({source.train(4, seed)[0].numpy().tobytes() for seed in range(20)}) > 15


def test_validation_is_the_first_test_view(data):
    preset = replace(find_preset("k400-base"), img_size=16, num_frames=2, rate=3)
    source = VideoClips(read_folder(data, "train"), preset, read_folder(data, "val"))
    clip, label, problems = source.validation(3)
    path, expected = source.held_out.clips[3]
    views = clip_views(path, replace(preset, crops=1), rule="original")
    assert torch.equal(clip, views[0]) and (label, problems) == (expected, []) == (1, [])


# the loop


def by_hand(model, source, recipe, steps, momentum=0.9):
    """SGD with Nesterov's momentum on whole batches, by its formula. -> losses"""
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    losses = []
    loader = iter(stream(source, Recipe(batch_size=recipe.batch_size, micro_batch=recipe.batch_size), 0, steps))
    for step in range(steps):
        batch = next(loader)
        loss = F.cross_entropy(model(batch.clips), batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if recipe.clip_grad:
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            gradients = [g * min(1.0, recipe.clip_grad / (norm.item() + 1e-6)) for g in gradients]
        with torch.no_grad():
            for parameter, gradient, buffer in zip(model.parameters(), gradients, buffers, strict=True):
                gradient = gradient + recipe.weight_decay * parameter
                buffer.mul_(momentum).add_(gradient)
                parameter.sub_(recipe.lr_at(step, len(source)) * (gradient + momentum * buffer))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
def test_the_loop_is_sgd_on_the_mean_loss(tmp_path, clip_grad):
    """Four parts a step, accumulated, against one whole batch and the formula, in plain torch."""
    recipe = Recipe(batch_size=8, micro_batch=2, epochs=4, lr=0.05, clip_grad=clip_grad)
    ours, theirs = (tiny(drop_path_rate=0.0) for _ in range(2))
    theirs.set_backend("reference")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    trainer = Trainer(ours, drawn(), recipe, tmp_path, log_every=1)
    trainer.run()
    losses = by_hand(theirs, drawn(), recipe, trainer.total)
    assert [line["loss"] for line in metrics(tmp_path) if "loss" in line] == pytest.approx(losses, rel=1e-5)
    for name, value in theirs.state_dict().items():
        step = (value - before[name]).abs().max()
        assert (ours.state_dict()[name] - value).abs().max() <= 1e-3 * step + 1e-7, name


def test_the_result_is_the_trained_model(tmp_path, data, capsys):
    """DIR/model loads, knows its classes and preset, and `val` of the metrics is what it answers."""
    assert train(*small(data, tmp_path / "run", "--epochs", 2, "--lr", 0.05, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    model = TimeSformer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.preset == "k400-base"
    preset = replace(find_preset("k400-base"), img_size=16, num_frames=2, crops=1)
    losses, right = [], 0
    for path, label in read_folder(data, "val").clips:
        with torch.inference_mode():
            logits = model(clip_views(path, preset, rule="original"))
        losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
        right += logits.argmax().item() == label
    assert printed["val"]["loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert (printed["val"]["top1"], printed["val"]["clips"], printed["skipped"]) == (right / 6, 6, 0)
    last = [line for line in metrics(tmp_path / "run") if "val" in line][-1]
    assert last == {"step": 3, "val": printed["val"]}
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record["command"].startswith("timesformer train ") and record["data"]["classes"] == list(CLASSES)


def test_training_starts_from_given_weights(tmp_path, data):
    """A checkpoint of other classes: its body is taken, its head begins anew."""
    torch.manual_seed(3)
    body = tiny(num_classes=7)
    torch.nn.init.normal_(body.time_embed)
    body.save_pretrained(tmp_path / "old")
    argv = [data, "--model", tmp_path / "old", "--out", tmp_path / "run", "--batch-size", 3, "--epochs", 1]
    assert train(*argv, "--lr", 1e-9, "--workers", 0, "--train-scale", 18, 22) == 0
    new = weights(tmp_path / "run")
    assert new["head.weight"].shape == (3, 16)
    for name, value in body.state_dict().items():
        if not name.startswith("head"):
            assert (new[name] - value).abs().max() < 1e-6, name


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(tmp_path, amp):
    """Losses beside those of float32, though not the same ones; weights stay float32."""
    losses = []
    for kind in ("off", amp):
        recipe = Recipe(batch_size=8, micro_batch=4, epochs=4, lr=0.05, amp=kind)
        model = tiny(drop_path_rate=0.0)
        Trainer(model, drawn(), recipe, tmp_path / kind, log_every=1).run()
        losses.append([line["loss"] for line in metrics(tmp_path / kind) if "loss" in line])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    written, purged = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            purged.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Trainer(tiny(), drawn(8), Recipe(batch_size=8, epochs=2), tmp_path, log_every=1).run()
    lines = metrics(tmp_path)
    assert purged == [(str(tmp_path / "tensorboard"), 0)] and written[-1] == "closed"
    assert ("loss", lines[0]["loss"], 1) in written and ("val/top1", lines[-1]["val"]["top1"], 2) in written


def test_without_tensorboard_and_tqdm(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert train(*small(data, tmp_path / "run", "--epochs", 1)) == 0
    assert "validation: " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "metrics.jsonl", "model"]
