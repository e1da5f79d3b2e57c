# SPDX-License-Identifier: Apache-2.0
"""`timesformer classify`: video files in, class names out."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

from .common import DTYPES, add_backend, add_command, check_backend, count, positive, progress

DEFAULT_MODEL = "facebook/timesformer-base-finetuned-k400"
UNTRAINED = "untrained"
DEMO = "demo"  # the model in the box

logger = logging.getLogger("timesformer")


def add_views(parser) -> None:
    """Options of which frames are seen, and how several views make one answer."""
    parser.add_argument("--preset", metavar="NAME", help="sampling and preprocessing (default: that of the model)")
    parser.add_argument("--frames", type=positive, metavar="N", help="frames of one clip")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="side of the square crops")
    parser.add_argument("--rate", type=positive, metavar="R", help="kinetics sampling: frames apart at 30 a second")
    parser.add_argument("--sampling", choices=("kinetics", "segments", "uniform"), help="which frames make a clip")
    parser.add_argument("--crops", type=int, choices=(1, 3), help="crops of each clip")
    parser.add_argument("--clips", type=positive, metavar="N", help="clips along the video (kinetics sampling)")
    parser.add_argument(
        "--resize",
        choices=("pil", "original"),
        default="pil",
        help="pil: uint8, antialiased; original: floats without antialiasing, as in training (default: pil)",
    )
    parser.add_argument(
        "--aggregate",
        choices=("logits", "prob"),
        default="logits",
        help="average the views' logits, as the original, or their probabilities (default: logits)",
    )


def add(commands) -> None:
    parser = add_command(
        commands,
        "classify",
        run,
        "say what happens in videos",
        "timesformer classify clip.mp4 --model facebook/timesformer-hr-finetuned-k600 --top-k 3",
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="video files, or folders of them")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="ID|PATH",
        help=f"hub id, folder or checkpoint file, {DEMO!r} for the model in the box that knows drawn shapes, or "
        f"{UNTRAINED!r} for random weights (default: {DEFAULT_MODEL})",
    )
    add_views(parser)
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="answers to print (default: 5)")
    parser.add_argument(
        "--labels", metavar="FILE", help="class names: one a line, or JSON (a list, or name <-> number)"
    )
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that decode (default: 0)")
    parser.add_argument("--strict", action="store_true", help="stop at the first video that cannot be read")
    add_backend(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic (default: float32)")
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def read_labels(path: str) -> dict[int, str]:
    """Class number -> name, from a text file (one name a line) or JSON: a list, {number: name} or {name: number}.

    Raises ValueError for anything else.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix.lower() != ".json":
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    try:
        values = json.loads(text)
        if isinstance(values, list):
            return dict(enumerate(map(str, values)))
        if all(isinstance(value, int) for value in values.values()):
            return {number: name.strip('"') for name, number in values.items()}
        return {int(number): str(name) for number, name in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--labels {path}: expected a JSON list, {{number: name}} or {{name: number}}") from error


def check_preset(args) -> None:
    """Wrong usage, exit code 2, for a preset that does not exist."""
    from ..presets import PRESETS

    if args.preset is not None and args.preset not in PRESETS:
        args.error(f"--preset: got {args.preset!r}, expected one of {', '.join(PRESETS)}")


def load_model(args, head: bool = True):
    """The model, in evaluation mode, and a preset of matching clips. head: ValueError for a model without one."""
    import torch

    from .. import TimeSformer, demo
    from ..presets import checkpoint_statistics, find_preset, preset_of_checkpoint

    preset = find_preset(args.preset) if args.preset else None
    if args.model == UNTRAINED:
        preset = _override(preset or find_preset("k400-base"), args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TimeSformer(
                preset.img_size, 16, preset.num_classes, preset.num_frames, preset.attention_type, backend=args.backend
            ).eval()
        print("UNTRAINED MODEL: its weights are random numbers, so the answers mean nothing", file=sys.stderr)
        return model, preset

    source = demo.folder() if args.model == DEMO else args.model
    model = TimeSformer.from_pretrained(source, backend=args.backend)
    config = model.config
    if head and not config.num_classes:
        raise ValueError(f"--model {args.model}: the checkpoint has no classifier, only features")
    if preset is None:
        named = find_preset(config.preset) if config.preset else preset_of_checkpoint(args.model)
        if named is None:
            named = find_preset("k400-base")
            print(f"{args.model} names no preset: {named.name} is used; see --preset", file=sys.stderr)
        size = config.img_size if isinstance(config.img_size, int) else min(config.img_size)
        preset = replace(named, num_frames=config.num_frames, img_size=size)
        # a checkpoint's own statistics win: fine-tuned models often differ from the release
        if statistics := checkpoint_statistics(source):
            preset = replace(preset, mean=statistics[0], std=statistics[1])
    return model, _override(preset, args)


def _override(preset, args):
    """The preset with what the command line says instead."""
    wanted = {
        "num_frames": args.frames,
        "img_size": args.img_size,
        "sampler": args.sampling,
        "rate": args.rate,
        "crops": args.crops,
        "clips": args.clips,
    }
    wanted = {name: value for name, value in wanted.items() if value is not None}
    sampler = wanted.get("sampler", preset.sampler)
    if sampler == "kinetics":
        wanted.setdefault("rate", preset.rate or 32)
    else:
        if args.rate is not None or (args.clips or 1) > 1:
            args.error(f"--rate, --clips: {sampler} sampling covers the whole video with one clip")
        wanted.update(rate=None, clips=1)
    return replace(preset, **wanted)


def _answer(model, preset, video, labels, args, step) -> dict:
    """The best classes of a loaded video: `aggregate` of its views, and logits averaged over them."""
    import torch

    from ..evaluation import aggregate, predict
    from ..video import clip_indices

    start, info = time.perf_counter(), video.info
    name, logits = Path(video.path).name, []
    for number, view in enumerate(video.views):  # one by one: memory does not grow with the number of views
        step(f"{name}: view {number + 1} of {len(video.views)}")
        logits.append(predict(model, view[None])[0])
    logits = torch.stack(logits)
    try:
        scores = aggregate(logits, args.aggregate)
    except ValueError as error:
        raise RuntimeError(f"{name}: {error} in {args.dtype}") from error
    logits = logits.mean(0)
    top = scores.topk(min(args.top_k, len(scores)))
    return {
        "video": video.path,
        "frames": info.frames,
        "fps": round(float(info.fps), 6),
        "clips": clip_indices(info.frames, info.fps, preset),
        "views": len(video.views),
        "seconds": round(video.seconds + time.perf_counter() - start, 3),
        "top": [
            {
                "class": index,
                "label": labels.get(index, f"class {index}"),
                "probability": probability,
                "logit": logits[index].item(),
            }
            for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
    }


def _print(result: dict, preset) -> None:
    print(
        f"{result['video']}: {result['frames']} frames, {result['fps']:.2f} fps; {result['views']} views of "
        f"{preset.num_frames} x {preset.img_size} x {preset.img_size}, {result['seconds']:.1f} s"
    )
    for answer in result["top"]:
        print(f"  {100 * answer['probability']:6.2f} %  {answer['label']}")


def check_device(args) -> None:
    import torch

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"--device {args.device}: cannot be used: {str(error).splitlines()[0]}") from error


def run(args) -> int:
    from ..video.loading import load_views

    check_backend(args)
    check_preset(args)
    check_device(args)
    labels = read_labels(args.labels) if args.labels else None
    videos, failed = _find(args)
    if not videos:
        if args.json:
            print(json.dumps({"model": args.model, "results": failed}, indent=2))
        return 1

    import torch

    model, preset = load_model(args)
    classes = model.config.num_classes
    if labels is None:
        labels = model.config.id2label or {}
    elif set(labels) != set(range(classes)):
        raise ValueError(f"--labels {args.labels}: got {len(labels)} names, expected one for each of {classes} classes")
    model = model.to(device=args.device, dtype=getattr(torch, args.dtype))

    results, skipped = [], []
    with progress(len(videos) * (1 + preset.clips * preset.crops)) as step:
        step("decoding")
        for place, video in enumerate(load_views(videos, preset, rule=args.resize, workers=args.workers)):
            if place:
                step(f"{Path(video.path).name}: decoding")
            if video.error is None:
                results.append(_answer(model, preset, video, labels, args, step))
            else:
                _unreadable(args, video.path, video.error, failed if video.path in args.videos else skipped)
    if args.json:
        settings = {
            "model": args.model,
            "untrained": args.model == UNTRAINED,
            "preset": preset.name,
            "num_frames": preset.num_frames,
            "img_size": preset.img_size,
            "sampling": preset.sampler,
            "rate": preset.rate,
            "crops": preset.crops,
            "mean": preset.mean,
            "std": preset.std,
            "channel_order": preset.channel_order,
            "resize": args.resize,
            "aggregate": args.aggregate,
            "backend": args.backend,
            "dtype": args.dtype,
            "device": args.device,
        }
        print(json.dumps({**settings, "results": results + failed + skipped}, indent=2))
    else:
        for result in results:
            _print(result, preset)
    if skipped:
        print(f"{len(skipped)} of {len(videos)} videos cannot be read and were skipped", file=sys.stderr)
    return 1 if failed or not results else 0


def _find(args) -> tuple[list, list[dict]]:
    """(the videos named, and the paths of those in folders; what is wrong with the named ones that cannot be read).

    Named files are looked at before the model is loaded: a wrong name should not cost a download.
    """
    from ..train.folders import video_files
    from ..video import VideoError, probe

    videos, failed = [], []
    for path in args.videos:
        if Path(path).is_dir():
            found = video_files(path)
            if not found:
                _unreadable(args, path, f"folder {path!r}: holds no video file", failed)
            videos += found
            continue
        try:
            videos.append(probe(path))
        except VideoError as error:
            _unreadable(args, path, str(error), failed)
    return videos, failed


def _unreadable(args, path: str, error: str, failed: list[dict]) -> None:
    """Say it and note it, or with --strict stop."""
    if args.strict:
        raise ValueError(error)
    print(f"timesformer classify: error: {error}", file=sys.stderr)
    failed.append({"video": path, "error": error})
