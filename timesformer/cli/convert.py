# SPDX-License-Identifier: Apache-2.0
"""`timesformer convert`: a checkpoint from one format to another, or the model as a program or an ONNX file."""

from __future__ import annotations

from pathlib import Path

from .common import add_command, positive

FORMATS = ("timesformer", "huggingface", "mmaction2", "vit")
PROGRAMS = (".onnx", ".pt2")


def add(commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "convert a checkpoint, or export its model to ONNX or torch.export",
        "timesformer convert TimeSformer_divST_8x32_224_K400.pyth model/ --to huggingface",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint file, folder or hub id of any known format")
    parser.add_argument(
        "target",
        metavar="DST",
        help=".safetensors, .pyth, .pth, .pt or .bin: one file; .onnx or .pt2: the model; anything else: a folder",
    )
    parser.add_argument("--to", choices=FORMATS, help="names and layout of DST (default: timesformer)")
    parser.add_argument("--from", dest="src_fmt", choices=FORMATS, help="what SRC is, if detection guesses wrong")
    parser.add_argument("--num-heads", type=positive, metavar="N", help="where SRC does not tell")
    parser.add_argument("--inflate", action="store_true", help="make a video model of an image ViT")
    parser.add_argument("--frames", type=positive, metavar="N", help=".onnx, .pt2, --inflate: frames of a clip")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help=".onnx, .pt2: side of the frames")
    parser.add_argument(
        "--backend",
        metavar="B",
        help=".pt2: auto keeps this package's operators in the program (default: reference, PyTorch's own alone)",
    )


def run(args) -> int:
    exporting = Path(args.target).suffix in PROGRAMS
    _check(args, exporting)
    if exporting:
        _export(args)
    elif args.inflate:
        _inflate(args)
    else:
        from ..weights import convert

        known = {} if args.num_heads is None else {"num_heads": args.num_heads}
        convert(args.source, args.target, args.to or "timesformer", src_fmt=args.src_fmt, config=known)
    print(f"{args.source} -> {args.target}")
    return 0


def _check(args, exporting: bool) -> None:
    """Wrong usage, exit code 2, for options that this target has no use for."""
    from timesformer_kernels import available_backends

    if exporting:
        for name, value in (("to", args.to), ("from", args.src_fmt), ("inflate", args.inflate)):
            if value:
                args.error(f"--{name}: not for {', '.join(PROGRAMS)}; convert to a checkpoint first")
        if args.backend is not None and Path(args.target).suffix == ".onnx":
            args.error("--backend: an ONNX file holds standard operators alone")
        if args.backend not in (None, "auto", *available_backends()):
            args.error(f"--backend: got {args.backend!r}, expected one of auto, {', '.join(available_backends())}")
        return
    for name in ("img_size", "backend") if args.inflate else ("frames", "img_size", "backend"):
        if getattr(args, name) is not None:
            args.error(f"--{name.replace('_', '-')}: for targets {', '.join(PROGRAMS)} only")


def _export(args) -> None:
    from .. import TimeSformer
    from ..export import export_onnx, export_pt2

    parent = Path(args.target).parent
    if not parent.is_dir():  # before the work
        raise FileNotFoundError(f"cannot write {args.target}: there is no folder {parent}")
    model = TimeSformer.from_pretrained(args.source, num_heads=args.num_heads)
    sizes = {"frames": args.frames, "size": args.img_size}
    if Path(args.target).suffix == ".onnx":
        export_onnx(model, args.target, **sizes)
    else:
        export_pt2(model, args.target, **sizes, backend=args.backend or "reference")


def _inflate(args) -> None:
    """An image ViT with time attention that starts at zero, as training starts from it; its classes stay."""
    from .. import TimeSformer
    from ..weights import read_checkpoint, save_checkpoint, save_pretrained
    from ..weights.read import SAFETENSORS_SUFFIX, TORCH_SUFFIXES

    known = {} if args.num_heads is None else {"num_heads": args.num_heads}
    found = read_checkpoint(args.source, fmt=args.src_fmt, config=known).fmt
    if found != "vit":
        raise ValueError(f"--inflate: {args.source} is a video model already, in format {found!r}")
    model = TimeSformer.from_pretrained(args.source, num_heads=args.num_heads, num_frames=args.frames)
    file = Path(args.target).suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    (save_checkpoint if file else save_pretrained)(model, args.target, fmt=args.to or "timesformer")
