# SPDX-License-Identifier: Apache-2.0
"""`timesformer features`: video files in, one file of features out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .clips import add_clips, check_clips, check_output, load, settings
from .common import add_command, positive, progress

METADATA = "timesformer_features"  # where the file keeps what its tensors are, as JSON text


def add(commands) -> None:
    parser = add_command(
        commands,
        "features",
        run,
        "write the features of videos, of any layer, to one file",
        "timesformer features *.mp4 -o features.safetensors --layer -2 --kind frame",
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="video files")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="a .safetensors file")
    parser.add_argument(
        "--layer", type=int, default=-1, metavar="K", help="from 0; negative ones from the end (default: -1, the last)"
    )
    parser.add_argument(
        "--kind",
        choices=("cls", "patch", "frame"),
        default="cls",
        help="cls: the class token, D numbers a clip; patch: T x h x w x D; frame: the mean over patches, T x D "
        "(default: cls)",
    )
    norm = parser.add_mutually_exclusive_group()
    norm.add_argument("--norm", action="store_true", default=None, help="through the model's last LayerNorm")
    norm.add_argument(
        "--no-norm", dest="norm", action="store_false", help="not so (default: through it after the last layer only)"
    )
    parser.add_argument("--crops", type=int, choices=(1, 3), default=1, help="crops of each clip (default: 1)")
    parser.add_argument("--clips", type=positive, default=1, metavar="N", help="clips along the video (default: 1)")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="clips at a time (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first video that cannot be read")
    add_clips(parser)


def run(args) -> int:
    from ..features import layer_number
    from ..files import whole
    from ..video import VideoError, probe
    from ..weights.write import save_safetensors

    check_clips(args)
    output = check_output(args, (".safetensors",))
    infos, failed = {}, 0
    for path in args.videos:  # before the model is loaded: a wrong file name should not cost a download
        try:
            infos[path] = probe(path)
        except VideoError as error:
            failed += _skip(args, error)
    if not infos:
        return 1

    model, preset = load(args)
    layer = layer_number(model, args.layer, "--layer")
    tensors, record = {}, {}
    with progress(len(infos)) as step:
        for path, info in infos.items():
            step(Path(path).name)
            try:
                tensors[path], record[path] = _features(args, model, preset, info)
            except VideoError as error:
                failed += _skip(args, error)
    if not tensors:
        return 1
    about = {"layer": layer, "kind": args.kind, "norm": _norms(args, model), "crops": preset.crops}
    text = json.dumps({**about, **settings(args, preset), "videos": record}, ensure_ascii=False)
    with whole(output) as temporary:
        save_safetensors(tensors, temporary, {METADATA: text})
    shape = " x ".join(map(str, next(iter(tensors.values())).shape))
    print(f"{output}: {args.kind} features of layer {layer} of {len(tensors)} videos, {shape} each")
    if failed:
        print(f"{failed} of {len(args.videos)} videos cannot be read and were left out", file=sys.stderr)
    return 1 if failed else 0


def _features(args, model, preset, info) -> tuple:
    """Features [views, ...] of one video, and what is noted of it."""
    from ..features import features_of_views
    from ..video import clip_indices, clip_views

    views = clip_views(info.path, preset, info=info)
    found = features_of_views(model, views, args.batch_size, layer=args.layer, kind=args.kind, norm=args.norm)
    if not found.isfinite().all():
        raise RuntimeError(f"{info.path}: the features are not finite in {args.dtype}")
    clips = clip_indices(info.frames, info.fps, preset)
    return found, {"frames": info.frames, "fps": round(float(info.fps), 6), "clips": clips}


def _norms(args, model) -> bool:
    """Whether the features went through the last LayerNorm."""
    return args.layer % len(model.blocks) == len(model.blocks) - 1 if args.norm is None else args.norm


def _skip(args, error) -> int:
    """Say what is wrong with a video, or with --strict stop. -> 1, for counting."""
    if args.strict:
        raise error
    print(f"timesformer features: error: {error}", file=sys.stderr)
    return 1
