# SPDX-License-Identifier: Apache-2.0
"""`timesformer attention`: where a model looks in a video, as a picture, a video or numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from .clips import add_clips, check_clips, check_output, load, settings
from .common import add_command, positive, progress

SUFFIXES = (".png", ".mp4", ".npz")


def add(commands) -> None:
    parser = add_command(
        commands,
        "attention",
        run,
        "draw where a model looks in a video",
        "timesformer attention clip.mp4 -o map.png --method space --layer -1 --head mean",
    )
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help=".png: the clip's frames with the map over them; .mp4: both side by side; .npz: the numbers",
    )
    parser.add_argument(
        "--method",
        choices=("rollout", "space", "time"),
        default="rollout",
        help="rollout: how much of each patch reaches the class token through all layers; space: the class token's "
        "attention in each frame; time: the attention each frame gets at each place (default: rollout)",
    )
    parser.add_argument("--layer", type=int, metavar="K", help="of space, time: from 0, or from the end (default: -1)")
    parser.add_argument(
        "--head", default="mean", metavar="H", help="mean, max or min over the heads, or one's number (default: mean)"
    )
    parser.add_argument("--discard", type=float, metavar="SHARE", help="of each row's least, in rollout (default: 0)")
    parser.add_argument("--query", metavar="ROW,COL|FRAME", help="space: a patch's attention instead; time: a frame's")
    parser.add_argument("--size", type=positive, default=224, metavar="PIXELS", help="of a drawn frame (default: 224)")
    add_clips(parser)
    parser.set_defaults(crops=1, clips=1)


def run(args) -> int:
    from ..video import probe

    check_clips(args)
    output = check_output(args, SUFFIXES)
    head = _check_method(args)
    info = probe(args.video)  # before the model is loaded: a wrong file name should not cost a download
    model, preset = load(args)
    with progress(3) as step:
        step("decoding")
        views = _views(info, preset)
        step(f"{args.method} maps")
        arrays = _maps(args, model, views, head)
        step(f"writing {output.name}")
        _write(args, output, info, preset, arrays)
    shown = arrays["map"]
    print(f"{output}: {args.method}, {shown.shape[0]} frames of {shown.shape[1]} x {shown.shape[2]} patches")
    return 0


def _check_method(args) -> int | str:
    """The head; wrong usage for options that the method has no use for."""
    from ..maps import FUSIONS

    head = int(args.head) if args.head.isascii() and args.head.isdigit() else args.head
    if isinstance(head, str) and head not in FUSIONS:
        args.error(f"--head: got {args.head!r}, expected {', '.join(FUSIONS)} or the number of a head")
    if args.method == "rollout":
        for name in ("layer", "query"):
            if getattr(args, name) is not None:
                args.error(f"--{name}: rollout goes through all layers from the class token; see --method")
        if isinstance(head, int):
            args.error(f"--head: got {head}, expected {', '.join(FUSIONS)}: rollout goes through all layers")
        if args.discard is not None and not 0 <= args.discard < 1:
            args.error(f"--discard: got {args.discard}, expected a share in [0, 1)")
    elif args.discard is not None:
        args.error("--discard: for rollout only")
    return head


def _views(info, preset):
    """The clip as the model takes it, [1, 3, T, size, size]."""
    from ..video import clip_views

    return clip_views(info.path, preset, info=info)


def _maps(args, model, views, head) -> dict:
    """Arrays by name: "map" [T, h, w], what is drawn, and all that it was taken from."""
    import torch

    from ..maps import attention_maps, rollout

    weight, (p, q) = model.patch_embed.proj.weight, model.patch_embed.proj.kernel_size
    grid = views.shape[3] // p, views.shape[4] // q
    video = views.to(weight.device, weight.dtype)
    with torch.inference_mode():
        if args.method == "rollout":
            found = {"map": rollout(model, video, fusion=head, discard=args.discard or 0.0)[0]}
        else:
            layer = -1 if args.layer is None else args.layer
            maps = getattr(attention_maps(model, video, layer, head=head, which=(args.method,)), args.method)[0]
            drawn = _time(args, maps, grid) if args.method == "time" else _space(args, maps, grid, video.shape[2])
            found = {"map": drawn, args.method: maps}
    found = {name: x.cpu().numpy() for name, x in found.items()}
    if not all(abs(x).sum() < float("inf") for x in found.values()):
        raise RuntimeError(f"{args.video}: the maps are not finite in {args.dtype}")
    return found


def _time(args, maps, grid):
    """maps [N, T, T] -> the attention that each frame gets at each place, of one frame or on average: [T, h, w]."""
    frames = maps.shape[-1]
    if args.query is None:
        gets = maps.mean(1)  # [N, T]
    else:
        if not args.query.isascii() or not args.query.isdigit() or int(args.query) >= frames:
            raise ValueError(f"--query: got {args.query!r}, expected one of the clip's frames, 0 to {frames - 1}")
        gets = maps[:, int(args.query)]
    return gets.unflatten(0, grid).movedim(2, 0)


def _space(args, maps, grid, frames):
    """maps [T, 1 + N, 1 + N], or [1, 1 + N*T, 1 + N*T] of joint models -> the query's attention, [T, h, w]."""
    row = 0
    if args.query is not None:
        place = [int(x) if x.isascii() and x.isdigit() else -1 for x in args.query.split(",")]
        if len(place) != 2 or not all(0 <= x < size for x, size in zip(place, grid, strict=True)):
            raise ValueError(f"--query: got {args.query!r}, expected ROW,COL of a patch, below {grid[0]} and {grid[1]}")
        row = 1 + place[0] * grid[1] + place[1]
    if len(maps) == frames and maps.shape[-1] == 1 + grid[0] * grid[1]:
        return maps[:, row, 1:].unflatten(1, grid)
    if row:
        raise ValueError("--query: a joint model's patches attend over all frames; expected none")
    return maps[0, 0, 1:].unflatten(0, (*grid, frames)).movedim(2, 0)


def _write(args, output: Path, info, preset, arrays: dict) -> None:
    import numpy as np
    import torch

    from ..overlay import overlay, sheet, side_by_side, write_npz, write_png
    from ..video import clip_indices, clip_views, write_video

    (indices,) = clip_indices(info.frames, info.fps, preset)
    if output.suffix == ".npz":
        about = {**settings(args, preset), "method": args.method, "layer": args.layer, "head": args.head}
        write_npz(output, {**arrays, "frames": np.array(indices), "settings": np.array(json.dumps(about))})
        return
    # The same crop at the size of the drawing, as pixels in [0, 1].
    plain = replace(preset, img_size=args.size, mean=(0.0,) * 3, std=(1.0,) * 3, channel_order="RGB")
    (pixels,) = clip_views(info.path, plain, info=info)  # [3, T, size, size]
    frames = (pixels.permute(1, 2, 3, 0) * 255 + 0.5).to(torch.uint8).numpy()
    drawn = overlay(frames, torch.from_numpy(arrays["map"]))
    if output.suffix == ".png":
        write_png(output, sheet(frames, drawn))
    else:
        seconds = (indices[-1] - indices[0]) / info.fps
        rate = max((len(indices) - 1) / seconds, 1) if seconds else 1  # as fast as the video runs, or a frame a second
        write_video(output, side_by_side(frames, drawn), rate)
