# SPDX-License-Identifier: Apache-2.0
"""What `features` and `attention` share: the model, the clips of a video file, and where the result goes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .classify import DEFAULT_MODEL
from .common import DTYPES, add_backend, check_backend, positive

DEMO = "demo"  # the model in the box


def add_clips(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of which frames it sees."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="ID|PATH",
        help=f"hub id, folder or checkpoint file, or {DEMO!r} for the model in the box (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument("--preset", metavar="NAME", help="sampling and preprocessing (default: that of the model)")
    parser.add_argument("--frames", type=positive, metavar="N", help="frames of one clip")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="side of the square crops")
    parser.add_argument("--rate", type=positive, metavar="R", help="kinetics sampling: frames apart at 30 a second")
    parser.add_argument("--sampling", choices=("kinetics", "segments", "uniform"), help="which frames make a clip")
    add_backend(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic (default: float32)")
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device (default: cpu)")


def check_clips(args) -> None:
    """Wrong usage, exit code 2, for a preset or backend that does not exist; RuntimeError for an unusable device."""
    import torch

    from ..presets import PRESETS

    check_backend(args)
    if args.preset is not None and args.preset not in PRESETS:
        args.error(f"--preset: got {args.preset!r}, expected one of {', '.join(PRESETS)}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"--device {args.device}: cannot be used: {str(error).splitlines()[0]}") from error


def check_output(args, suffixes: tuple[str, ...]) -> Path:
    """The file to write, before any work: wrong usage for another suffix, FileNotFoundError for a missing folder."""
    path = Path(args.output)
    if path.suffix not in suffixes:
        args.error(f"--output: got {args.output!r}, expected a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {args.output}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--output {args.output}: it exists and is a folder")
    return path


def load(args):
    """The model, in evaluation mode on its device and in its dtype, and a preset of matching clips."""
    import torch

    from .. import TimeSformer
    from ..presets import checkpoint_statistics, find_preset, preset_of_checkpoint

    source = args.model
    if source == DEMO:
        from ..demo import folder

        source = folder()
    model = TimeSformer.from_pretrained(source, backend=args.backend)
    config = model.config
    if args.preset:
        preset = find_preset(args.preset)
    else:
        preset = find_preset(config.preset) if config.preset else preset_of_checkpoint(args.model)
        if preset is None:
            preset = find_preset("k400-base")
            print(f"{args.model} names no preset: {preset.name} is used; see --preset", file=sys.stderr)
        size = config.img_size if isinstance(config.img_size, int) else min(config.img_size)
        preset = replace(preset, num_frames=config.num_frames, img_size=size)
        # a checkpoint's own statistics win: fine-tuned models often differ from the release
        if statistics := checkpoint_statistics(source):
            preset = replace(preset, mean=statistics[0], std=statistics[1])
    return model.to(device=args.device, dtype=getattr(torch, args.dtype)), override(preset, args)


def override(preset, args):
    """The preset with what the command line says instead; one centre crop unless it says otherwise."""
    wanted = {
        "num_frames": args.frames,
        "img_size": args.img_size,
        "sampler": args.sampling,
        "rate": args.rate,
        "clips": args.clips,
    }
    wanted = {name: value for name, value in wanted.items() if value is not None} | {"crops": args.crops}
    sampler = wanted.get("sampler", preset.sampler)
    if sampler == "kinetics":
        wanted.setdefault("rate", preset.rate or 32)
        wanted.setdefault("clips", 1)
    else:
        if args.rate is not None or (args.clips or 1) > 1:
            args.error(f"--rate, --clips: {sampler} sampling covers the whole video with one clip")
        wanted.update(rate=None, clips=1)
    return replace(preset, **wanted)


def settings(args, preset) -> dict:
    """What the model saw and how, for records."""
    return {
        "model": args.model,
        "preset": preset.name,
        "num_frames": preset.num_frames,
        "img_size": preset.img_size,
        "sampling": preset.sampler,
        "rate": preset.rate,
        "mean": preset.mean,
        "std": preset.std,
        "channel_order": preset.channel_order,
        "backend": args.backend,
        "dtype": args.dtype,
        "device": args.device,
    }
