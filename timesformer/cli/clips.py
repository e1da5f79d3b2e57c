# SPDX-License-Identifier: Apache-2.0
"""What `features` and `attention` share: the model, the clips of a video file, and where the result goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from .classify import DEFAULT_MODEL, check_device, check_preset, load_model
from .common import DTYPES, add_backend, check_backend, positive


def add_clips(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of which frames it sees."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="ID|PATH", help=f"see `classify` (default: {DEFAULT_MODEL})"
    )
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
    check_backend(args)
    check_preset(args)
    check_device(args)


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
    """The model, in evaluation mode on its device and in its dtype, with or without a head; a preset of its clips."""
    import torch

    model, preset = load_model(args, head=False)
    return model.to(device=args.device, dtype=getattr(torch, args.dtype)), preset


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
