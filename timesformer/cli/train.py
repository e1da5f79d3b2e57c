# SPDX-License-Identifier: Apache-2.0
"""`timesformer train`: a model trained on videos in folders, or on clips drawn for a miniature task."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from .classify import DEFAULT_MODEL, DEMO, UNTRAINED, check_preset
from .common import add_backend, add_command, check_backend, count, positive

# Command-line name of every field of the recipe that can be given. None: what the recipe says.
RECIPE = {
    "batch_size": (positive, "N", "clips of one step, over all processes"),
    "micro_batch": (positive, "N", "clips that go through the model at once; gradients are accumulated"),
    "epochs": (positive, "N", "passes over the training clips"),
    "lr": (float, "LR", "learning rate"),
    "weight_decay": (float, "W", "of every parameter, as in the original; of matrices alone for a --task"),
    "warmup": (count, "STEPS", "linear growth of the learning rate"),
    "clip_grad": (float, "NORM", "largest norm of the gradient, 0 for any"),
    "label_smoothing": (float, "S", "part of the label spread over all classes"),
    "seed": (count, "N", "of every random choice"),
}


def add(commands) -> None:
    from ..train.recipe import AMP, MINIATURE, OPTIMISERS, SCHEDULES, Recipe
    from ..train.tasks import TASKS

    parser = add_command(
        commands,
        "train",
        run,
        "train on folders train|val/<class>/*.mp4, or on clips drawn for a miniature task",
        "timesformer train videos --model facebook/timesformer-base-finetuned-k400 --out run\n"
        "  timesformer train --task direction --out tiny\n"
        "  torchrun --nproc-per-node 8 -m timesformer.cli train videos --out run --device cuda --amp bfloat16",
    )
    parser.add_argument(
        "data", metavar="DATA_DIR", nargs="?", help="holds train/<class>/*.mp4 and, if any, val/<class>"
    )
    parser.add_argument("--task", choices=TASKS, help="instead of DATA_DIR: clips drawn for this task")
    parser.add_argument("--out", metavar="DIR", required=True, help="checkpoint, metrics and, at the end, DIR/model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, exactly")
    parser.add_argument(
        "--model",
        metavar="ID|PATH",
        help=f"weights to start from: hub id, folder or file, TimeSformer or image ViT; {DEMO!r} or {UNTRAINED!r} "
        f"(default: {DEFAULT_MODEL}; for a --task {UNTRAINED})",
    )
    parser.add_argument("--config", metavar="JSON", help=f"sizes of an {UNTRAINED} model: fields of TimeSformerConfig")
    parser.add_argument("--preset", metavar="NAME", help="sampling and augmentation (default: that of the model)")
    parser.add_argument("--frames", type=positive, metavar="N", help="frames of one clip")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="side of the square crops")
    parser.add_argument("--train-scale", type=positive, nargs=2, metavar=("LOW", "HIGH"), help="random short side")
    parser.add_argument("--attention", choices=("divided_space_time", "joint_space_time", "space_only"))
    for name, (kind, metavar, text) in RECIPE.items():
        original, miniature = getattr(Recipe(), name), getattr(MINIATURE, name)
        default = f"{original:g}" if original == miniature else f"{original:g}; with --task {miniature:g}"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})")
    parser.add_argument(
        "--optimiser", choices=OPTIMISERS, help="default: sgd with Nesterov's momentum; with --task adamw"
    )
    parser.add_argument("--schedule", choices=SCHEDULES, help="default: steps at 11/15 and 14/15; with --task cosine")
    parser.add_argument("--amp", choices=AMP, help="mixed precision by autocast (default: off)")
    parser.add_argument(
        "--clips", type=positive, default=3200, metavar="N", help="drawn clips of an epoch (default: 3200)"
    )
    parser.add_argument(
        "--table-std",
        type=float,
        default=1.0,
        metavar="S",
        help="of the tables of a --task model (default: 1)",
    )
    parser.add_argument("--save-every", type=positive, metavar="STEPS", help="checkpoints (default: every epoch)")
    parser.add_argument(
        "--log-every", type=positive, default=10, metavar="STEPS", help="lines of metrics (default: 10)"
    )
    parser.add_argument("--workers", type=count, metavar="N", help="processes that decode (default: 2; with --task 0)")
    parser.add_argument("--strict", action="store_true", help="a video that cannot be read ends the training")
    parser.add_argument("--distributed", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (default: ddp)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch and of the kernels (default: torch's)")
    add_backend(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _recipe(args):
    from ..train import MINIATURE, Recipe

    names = (*RECIPE, "optimiser", "schedule", "amp")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = MINIATURE if args.task else Recipe()
    if "batch_size" in given and "micro_batch" not in given:
        given["micro_batch"] = min(recipe.micro_batch, given["batch_size"])
    try:
        return replace(recipe, **given)
    except ValueError as error:
        args.error(f"--{str(error).replace('_', '-', str(error).split(':')[0].count('_'))}")


def _usage(args) -> None:
    """Exit code 2 for options that do not go together."""
    if bool(args.data) == bool(args.task):
        args.error("expected either DATA_DIR or --task")
    if args.config and args.model not in (None if args.task else UNTRAINED, UNTRAINED):
        args.error(f"--config: describes an {UNTRAINED} model; a trained one brings its own")
    if args.task and args.model not in (None, UNTRAINED):
        args.error(f"--task: trains an {UNTRAINED} model, --model {args.model} has no place there")
    if not 0 <= args.table_std < float("inf"):
        args.error(f"--table-std: got {args.table_std}, expected at least 0")
    if args.workers is None:
        args.workers = 0 if args.task else 2
    check_backend(args)
    check_preset(args)


def _preset(args, name: str | None):
    from ..presets import find_preset

    return find_preset(args.preset or name or "k400-base")


def _sized(args, preset):
    """The preset with the sizes of the command line."""
    wanted = {"num_frames": args.frames, "img_size": args.img_size}
    wanted["train_scale"] = tuple(args.train_scale) if args.train_scale else None
    preset = replace(preset, **{name: value for name, value in wanted.items() if value is not None})
    if args.data and min(preset.train_scale) < preset.img_size:
        if args.train_scale:
            args.error(f"--train-scale: got {preset.train_scale}, expected at least --img-size = {preset.img_size}")
        scale = tuple(round(preset.img_size * side / 224) for side in (256, 320))  # the original's proportions
        preset = replace(preset, train_scale=scale)
    return preset


def _untrained(args, preset, classes: tuple[str, ...], recipe):
    """A new model, its random weights drawn from the recipe's seed."""
    import torch

    from .. import TimeSformer, TimeSformerConfig
    from ..train.tasks import MODEL, initialise

    sizes = dict(MODEL) if args.task else {}
    if args.config:
        try:
            sizes |= json.loads(Path(args.config).read_text(encoding="utf-8"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config {args.config}: expected a JSON object ({error})") from error
    sizes |= {"img_size": preset.img_size, "num_frames": preset.num_frames, "num_classes": len(classes)}
    sizes |= {"attention_type": args.attention or sizes.get("attention_type", preset.attention_type)}
    sizes |= {"id2label": dict(enumerate(classes)), "preset": preset.name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = TimeSformer.from_config(TimeSformerConfig.from_dict(sizes), backend=args.backend)
        if args.task:
            initialise(model, args.table_std)
    return model


def _pretrained(args, folder):
    """(a trained model with a new head for other classes, its preset)."""
    import torch

    from .. import TimeSformer, demo
    from ..presets import preset_of_checkpoint

    wanted = {"num_frames": args.frames, "img_size": args.img_size, "attention_type": args.attention}
    source = demo.folder() if args.model == DEMO else args.model or DEFAULT_MODEL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed or 0)  # of the new head
        model = TimeSformer.from_pretrained(source, num_classes=len(folder.classes), backend=args.backend, **wanted)
    released = preset_of_checkpoint(str(source))
    preset = _preset(args, model.config.preset or (released and released.name))
    size = model.config.img_size if isinstance(model.config.img_size, int) else min(model.config.img_size)
    preset = _sized(args, replace(preset, img_size=size, num_frames=model.config.num_frames))
    model.config = replace(model.config, id2label=dict(enumerate(folder.classes)), preset=preset.name)
    return model, preset


def _prepare(args, recipe):
    """(model, source of clips)"""
    from ..train import DrawnClips, VideoClips, read_folder
    from ..train.folders import has_split, relabel

    if args.task:
        preset = _sized(args, _preset(args, "miniature"))
        source = DrawnClips(args.task, preset, args.clips)
        return _untrained(args, preset, source.classes, recipe), source
    folder = read_folder(args.data, "train")
    held_out = None
    if has_split(args.data, "val"):
        names = dict(enumerate(folder.classes))
        held_out = relabel(read_folder(args.data, "val"), names, len(names), str(Path(args.data) / "val"))
    else:
        print(f"{args.data}: no folder 'val': trained without validation", file=sys.stderr)
    if args.model == UNTRAINED:
        preset = _sized(args, _preset(args, None))
        model = _untrained(args, preset, folder.classes, recipe)
    else:
        model, preset = _pretrained(args, folder)
    return model, VideoClips(folder, preset, held_out, args.strict)


def _bar(args, first: bool):
    """(context, show(step, total, text)): a tqdm bar on stderr, or nothing where it is not installed or not wanted."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext(), lambda step, total, text: None
    bar = tqdm(file=sys.stderr, unit="step", dynamic_ncols=True, disable=not first)

    def show(step: int, total: int, text: str) -> None:
        bar.total = total
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)

    return bar, show


def run(args) -> int:
    _usage(args)
    recipe = _recipe(args)
    import torch

    from ..train import Processes, Stopped, Trainer

    if args.device == "cuda" and not torch.cuda.is_available():
        args.error("--device: got cuda, but torch.cuda.is_available() is False")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, source = _prepare(args, recipe)
    command = shlex.join(["timesformer", *getattr(args, "argv", [])])
    processes = Processes.start(args.distributed, args.device)
    try:
        trainer = Trainer(
            model, source, recipe, Path(args.out), processes, args.workers, args.save_every or 0, args.log_every,
            args.resume, command,
        )  # fmt: skip
        bar, show = _bar(args, processes.first)
        try:
            with bar:
                result = trainer.run(show)
        except Stopped as stop:
            if processes.first:
                print(f"timesformer train: stopped after step {trainer.step}; --resume goes on", file=sys.stderr)
            return 128 + stop.args[0]
    finally:
        processes.stop()
    if processes.first:
        _print(args, trainer, result)
    return 0


def _print(args, trainer, result: dict) -> None:
    folder = os.path.join(args.out, "model")
    if args.json:
        print(json.dumps({"model": folder, "steps": trainer.total, "skipped": trainer.skipped, "val": result or None}))
        return
    print(f"{folder}: {trainer.total} steps of {trainer.recipe.batch_size} clips")
    if trainer.skipped:
        print(f"{trainer.skipped} times a video could not be read and another took its place")
    if result:
        print(f"validation: {100 * result['top1']:.2f} % right of {result['clips']} clips, loss {result['loss']:.3f}")
