# SPDX-License-Identifier: Apache-2.0
"""`timesformer demo`: a fresh video named by the trained model in the box, and the full-size model, fused and in plain
torch, compared on another.

Ends with 1 where the two disagree, or where the clip is named wrongly, as fewer than 2 fresh clips in 100 are.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from .common import DTYPES, add_backend, add_command, check_backend, count, positive, progress

FPS = 30
VIDEO_FRAMES = 264  # just over the 256 that a clip of the published 8 x 32 sampling covers
# Largest difference of logits, relative to the largest logit, that still counts as agreement. float32: twelve blocks
# of sums in another order. bfloat16 and float16: a few of their own rounding steps, 2^-8 and 2^-11, add up. A wrong
# grouping of tokens moves the logits by a quarter of their scale or more.
LIMITS = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TINY = {"patch_size": 8, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}


def add(commands) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        "name what happens in a video made here, and run a full-size TimeSformer, fused against plain torch",
        "timesformer demo --frames 8 --dtype bfloat16 --keep shapes.mp4",
    )
    parser.add_argument("--frames", type=positive, default=8, metavar="N", help="frames of the clip (default: 8)")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="side of the crop (default: 224, tiny: 32)")
    add_backend(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the full-size model's random weights (default: 0)")
    parser.add_argument("--clip", type=count, metavar="N", help="number of the clip to draw and name (default: any)")
    parser.add_argument("--keep", metavar="FILE", help="keep the video that is named under this name")
    parser.add_argument("--tiny", action="store_true", help="a two-block model of width 32 instead, for a quick check")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def shapes(frames: int, height: int = 240, width: int = 320):
    """[frames, height, width, 3] uint8 RGB: a disc and a square that cross a shaded background."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = np.stack([x * 160 // width, y * 160 // height, np.full_like(x, 70)], -1)
    for index, image in enumerate(video):
        phase = index / max(frames - 1, 1)
        centre = 40 + phase * (width - 80), height / 2 + 60 * np.sin(6 * phase)
        image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 30**2] = (230, 80, 60)
        left, top = int((1 - phase) * (width - 50)), int(phase * (height - 50))
        image[top : top + 50, left : left + 50] = (70, 90, 220)
    return video


def _randomise(model, seed: int) -> None:
    """Every parameter random, and attention peaked.

    Freshly initialised, the model ignores time (temporal_fc and time_embed are zero) and attends almost evenly, so
    that even a wrong grouping of tokens would hardly show.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if name.endswith("_embed"):  # position and time, beside patches of about 1
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:  # variance 1 / inputs keeps the signal's; sqrt(3): scores of deviation 3
                gain = 3**0.5 if "qkv" in name else 1.0
                parameter.copy_(gain * parameter[0].numel() ** -0.5 * noise)
            else:
                parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.02 * noise)


def _forward(model, views, backend: str):
    """(logits, seconds): the second of two passes, the first one warms up."""
    import torch

    model.set_backend(backend)
    with torch.inference_mode():
        model(views)
        start = time.perf_counter()
        logits = model(views)
        return logits.double(), time.perf_counter() - start


def _name(args, path: Path, step) -> dict:
    """A fresh clip, drawn, encoded, decoded and named by the trained model."""
    from ..demo import Namer, write_clip

    number = secrets.randbelow(10**9) if args.clip is None else args.clip
    step(f"drawing clip {number}, encoding H.264")
    truth = write_clip(path, number)
    step("naming what happens in it")
    namer = Namer(args.backend)
    answer = namer(path)
    return {
        "clip": number,
        "truth": truth,
        "answer": answer.name,
        "probability": answer.probability,
        "right": answer.name == truth,
        "parameters": sum(parameter.numel() for parameter in namer.model.parameters()),
    }


def _compare(args, path: Path, preset, backend: str, step) -> dict:
    import numpy as np
    import torch

    from .. import TimeSformer
    from ..video import clip_indices, clip_views, probe, read_frames, write_video

    step("encoding H.264")
    drawn = shapes(VIDEO_FRAMES)
    write_video(path, drawn, FPS)
    step("decoding")
    info = probe(path)
    indices = clip_indices(info.frames, info.fps, preset)[0]
    decoded = read_frames(path, indices, info=info)
    error = float(np.abs(decoded.astype(np.float32) - drawn[indices]).mean())
    views = clip_views(path, preset, info=info)
    step("building the untrained model")
    size = TINY if args.tiny else {}
    with torch.device("meta"):  # no initialisation that would be overwritten
        model = TimeSformer(preset.img_size, num_frames=preset.num_frames, **size).eval()
    model.to_empty(device="cpu")
    _randomise(model, args.seed)
    dtype = getattr(torch, args.dtype)
    model, views = model.to(dtype), views.to(dtype)
    step(f"running the {backend} backend twice")
    fused, fused_seconds = _forward(model, views, backend)
    step("running plain torch twice")
    reference, reference_seconds = _forward(model, views, "reference")
    scale = reference.abs().max().item()
    difference = (fused - reference).abs().max().item() / scale
    limit = LIMITS[args.dtype]
    return {
        "video": {"frames": info.frames, "fps": float(info.fps), "codec": info.codec, "mean_error_grey_levels": error},
        "clip": indices,
        "model": {
            "untrained": True,
            "seed": args.seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "img_size": preset.img_size,
            "num_frames": preset.num_frames,
        },
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "backend": backend,
        "seconds": {backend: fused_seconds, "reference": reference_seconds},
        "relative_difference": difference,
        "limit": limit,
        "agree": difference <= limit,  # False for NaN too
    }


def _print(result: dict) -> None:
    video, model, backend = result["video"], result["model"], result["backend"]
    seconds = result["seconds"]
    motion = result["motion"]
    print(
        f"clip {motion['clip']}: the trained model ({motion['parameters']:,} parameters) sees: {motion['answer']} "
        f"({100 * motion['probability']:.1f} %)"
    )
    print(f"           {'right' if motion['right'] else 'WRONG'}: drawn was {motion['truth']}")
    print(
        f"video      {video['frames']} frames of {video['codec']} at {video['fps']:g} fps, decoded within "
        f"{video['mean_error_grey_levels']:.1f} grey levels of what was drawn"
    )
    print(f"clip       frames {', '.join(map(str, result['clip']))}")
    print(
        f"model      UNTRAINED, random weights from seed {model['seed']}: {model['parameters']:,} parameters, "
        f"{model['num_frames']} x {model['img_size']} x {model['img_size']}, {result['dtype']}"
    )
    print(f"{backend:<10} {seconds[backend]:.3f} s a clip, {result['threads']} threads")
    print(
        f"reference  {seconds['reference']:.3f} s a clip: plain torch, {seconds['reference'] / seconds[backend]:.2f} x"
    )
    print(
        f"agreement  {'yes' if result['agree'] else 'NO'}: the logits differ by {result['relative_difference']:.1e} "
        f"of their scale, limit {result['limit']:.0e}"
    )


def _resolve(args) -> str:
    """The backend that will run, by name. Raises RuntimeError with its reason where a named one cannot."""
    import torch

    from timesformer_kernels import registry

    head_dim = TINY["embed_dim"] // TINY["num_heads"] if args.tiny else 64
    return registry.resolve(args.backend, "cpu", getattr(torch, args.dtype), head_dim).name


def run(args) -> int:
    from ..presets import find_preset

    check_backend(args)
    backend = _resolve(args)
    if backend == "reference":
        print("no fused backend runs here (see `timesformer env`): plain torch against itself", file=sys.stderr)
    preset = replace(
        find_preset("k400-base"),
        img_size=args.img_size or (32 if args.tiny else 224),
        num_frames=args.frames,
        rate=max(256 // args.frames, 1),
        crops=1,
    )
    with tempfile.TemporaryDirectory() as folder, progress(7) as step:
        motion = _name(args, Path(args.keep or Path(folder) / "clip.mp4"), step)
        result = {"motion": motion, **_compare(args, Path(folder) / "shapes.mp4", preset, backend, step)}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    if not motion["right"]:
        print(f"timesformer demo: error: {_mistake(motion)}", file=sys.stderr)
    return 0 if result["agree"] and motion["right"] else 1


def _mistake(motion: dict) -> str:
    named = f"clip {motion['clip']} was drawn as {motion['truth']!r} and named {motion['answer']!r}"
    return f"{named}. Fewer than 2 fresh clips in 100 are named wrongly: run it again for another, or with --clip 0"
