# SPDX-License-Identifier: Apache-2.0
"""`timesformer evaluate`: accuracy on labelled videos in folders, from several views of each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from .classify import DEFAULT_MODEL, add_views, check_device, check_preset, load_model
from .common import DTYPES, add_backend, add_command, check_backend, count, positive, progress


def add(commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run,
        "measure accuracy on folders val/<class>/*.mp4, clips x crops views a video",
        "timesformer evaluate videos --model run/model --clips 10 --crops 3 --workers 4",
    )
    parser.add_argument("data", metavar="DATA_DIR", help="holds SPLIT/<class>/*.mp4")
    parser.add_argument("--split", default="val", metavar="NAME", help="folder in DATA_DIR (default: val)")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="ID|PATH", help=f"see `classify` (default: {DEFAULT_MODEL})"
    )
    add_views(parser)
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="views at once (default: 1)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes that decode (default: 2)")
    parser.add_argument("--strict", action="store_true", help="a video that cannot be read is an error")
    add_backend(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic (default: float32)")
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every video's answer")


def run(args) -> int:
    from ..evaluation import evaluate
    from ..train.folders import read_folder, relabel
    from ..video.loading import load_views

    check_backend(args)
    check_preset(args)
    check_device(args)
    folder = read_folder(args.data, args.split)  # before the model is loaded: a wrong folder should not cost a download

    import torch

    model, preset = load_model(args)
    folder = relabel(folder, model.config.id2label, model.config.num_classes, str(Path(args.data) / args.split))
    model = model.to(device=args.device, dtype=getattr(torch, args.dtype))
    paths, labels = zip(*folder.clips, strict=True)
    start = time.perf_counter()
    with progress(len(paths)) as step:

        def seen(video) -> None:
            step(Path(video.path).name)
            if video.error and not args.strict:
                print(f"timesformer evaluate: skipped: {video.error}", file=sys.stderr)

        videos = load_views(paths, preset, rule=args.resize, workers=args.workers)
        result = evaluate(
            model, videos, labels, how=args.aggregate, batch=args.batch_size, strict=args.strict, seen=seen
        )
    if not result.videos:
        raise RuntimeError(f"not one of the {len(paths)} videos can be read")
    summary = result.summary()
    if args.json:
        settings = {"model": args.model, "preset": preset.name, "clips": preset.clips, "crops": preset.crops}
        settings |= {"num_frames": preset.num_frames, "img_size": preset.img_size, "aggregate": args.aggregate}
        settings |= {"seconds": round(time.perf_counter() - start, 3), "classes": list(folder.classes)}
        print(json.dumps({**settings, **summary, "answers": result.videos, "unreadable": result.skipped}, indent=2))
        return 0
    print(
        f"{summary['videos']} videos, {preset.clips} x {preset.crops} views of {preset.num_frames} x "
        f"{preset.img_size} x {preset.img_size}; {summary['skipped']} skipped"
    )
    top5 = f", top-5 {100 * summary['top5']:.2f} %" if len(folder.classes) > 5 else ""
    print(
        f"top-1 {100 * summary['top1']:.2f} %{top5}, mean over classes {100 * summary['mean_class']:.2f} %, "
        f"loss {summary['loss']:.4f}"
    )
    return 0
