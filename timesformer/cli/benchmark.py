# SPDX-License-Identifier: Apache-2.0
"""`timesformer benchmark`: this machine's times of our kernels, of what one would use instead, and of the floor."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from .common import DTYPES, add_command, check_backend, positive, progress

LEVELS = ("core", "half-block", "block", "model", "train")
SCHEMES = ("time", "space")
DIRECTIONS = ("forward", "backward", "forward+backward")
RESTARTS = 8
RECORDED = """level scheme frames img_size batch_size heads head_dim dtype direction backend rows full seconds budget
    largest_batch device threads tiny"""


def add(commands) -> None:
    parser = add_command(
        commands,
        "benchmark",
        run,
        "time attention, blocks, the model or a training step against what one would use instead",
        "timesformer benchmark --level core --frames 8 16 --dtype float32 --plot times.png",
    )
    several = dict(nargs="+")
    parser.add_argument("--level", choices=(*LEVELS, "all"), default=["core"], help="default: core", **several)
    parser.add_argument(
        "--scheme", choices=SCHEMES, default=list(SCHEMES), help="of the core (default: both)", **several
    )
    parser.add_argument("--frames", type=positive, default=[8], metavar="T", help="default: 8", **several)
    parser.add_argument("--img-size", type=positive, default=[224], metavar="PIXELS", help="default: 224", **several)
    parser.add_argument("--batch-size", type=positive, metavar="B", help="default: 1 on a CPU, 8 on a GPU", **several)
    parser.add_argument("--heads", type=positive, default=12, metavar="H", help="default: 12")
    parser.add_argument("--head-dim", type=positive, default=[64], metavar="D", help="default: 64", **several)
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU", **several)
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: all; forward for the model", **several)
    parser.add_argument("--backend", default="auto", help="only this one of ours (default: auto, all that can run)")
    parser.add_argument("--rows", metavar="ROW", help="only these rows, as the tables call them", **several)
    parser.add_argument("--full", action="store_true", help="more peers: those that compile for seconds, too")
    parser.add_argument("--seconds", type=float, metavar="S", help="timing of a row (default: 0.3; 2 on a CPU)")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no table after so many seconds")
    parser.add_argument("--largest-batch", type=positive, metavar="MAX", help="instead: how many clips a row can take")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch and of the kernels (default: torch's)")
    parser.add_argument("--out", metavar="FILE", help="write JSON, anew after every row: benchmarks/report.py reads it")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--plot", metavar="PNG", help="draw the times: bars, or lines over --frames")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tests the command, measures nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(args) -> list[str]:
    """The command line that gives `args`, files by their last part."""
    parts = ["timesformer", "benchmark"]
    for name in RECORDED.split():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if isinstance(value, list):
            parts += [flag, *map(str, value)]
        elif value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            parts += [flag, str(value)]
    return parts


def problems(args) -> list:
    """[(make(batch) -> Problem, directions or None for all)], in the order of the arguments."""
    levels = LEVELS if "all" in args.level else tuple(dict.fromkeys(args.level))
    found = []
    for level in levels:
        directions = args.direction or (["forward"] if level == "model" else None)
        for dtype in args.dtype:
            for sizes in _sizes(args, level):
                for scheme in args.scheme if level == "core" else [None]:
                    make = partial(_problem, args, level, scheme, sizes, dtype)
                    found.append((make, None if level == "train" else directions))
    return found


def _problem(args, level: str, scheme: str | None, sizes, dtype: str, batch: int):
    import torch

    from ..benchmarking import block, core, half_block, model, train

    options = dict(backend=None if args.backend == "auto" else args.backend)
    where = sizes(batch), getattr(torch, dtype), args.device
    if level == "core":
        return core.AttentionProblem(scheme, *where, **options)
    kinds = {"half-block": half_block.HalfBlockProblem, "block": block.BlockProblem}
    kinds |= {"model": model.ModelProblem, "train": train.TrainProblem}
    problem = kinds[level](*where, **options)
    if args.tiny and level in ("model", "train"):
        problem.patch, problem.depth, problem.classes = 8, 2, 5
    return problem


def _sizes(args, level: str) -> list:
    """Functions batch -> Shape."""
    from ..benchmarking import shapes

    if args.tiny:
        tiny = shapes.TINY if level in ("core", "half-block") else shapes.TINY_SQUARE
        return [lambda batch: replace(tiny, batch=batch)]
    sizes = [(t, p, d) for p in args.img_size for t in args.frames for d in args.head_dim]
    return [
        lambda batch, t=t, p=p, d=d: shapes.clip(t, p, heads=args.heads, head_dim=d, batch=batch) for t, p, d in sizes
    ]


def _defaults(args) -> None:
    import torch

    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        args.error("--device: got cuda, but torch.cuda.is_available() is False")
    args.device = args.device or ("cuda" if gpu else "cpu")
    gpu = args.device == "cuda"
    args.batch_size = args.batch_size or [8 if gpu else 1]
    args.dtype = args.dtype or ["bfloat16" if gpu else "float32"]
    if args.seconds is None:
        args.seconds = 0.0 if args.tiny else 0.3 if gpu else 2.0
    for name, least in (("seconds", 0.0), ("budget", 0.0)):
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            args.error(f"--{name}: got {getattr(args, name)}, expected at least {least:g}")
    if args.resume and args.out is None:
        args.error("--resume: needs --out, the file to go on with")
    for pixels in args.img_size:
        if pixels % 16:
            args.error(f"--img-size: got {pixels}, expected a multiple of 16")


def _measure(args, record, facts) -> None:
    from ..benchmarking.machine import Ceilings
    from ..benchmarking.run import Protocol, Run

    protocol = Protocol(args.seconds, least=2 if args.tiny else 5, warmup=1 if args.tiny else 2)
    deadline = None if args.budget is None else args.started + args.budget
    rows = None if args.rows is None else tuple(args.rows)
    job = Run(record, facts, Ceilings(args.device, small=args.tiny), protocol, args.device, deadline=deadline)
    job.rows, job.full = rows, args.full
    todo = [(make, directions) for make, directions in problems(args)]
    if args.largest_batch:
        tasks = [(make, d, row) for make, ds in todo for d in ds or make(1).directions for row in job.names(make(1))]
        with progress(len(tasks)) as step:
            for make, direction, row in tasks:
                step(f"largest batch, {direction}: {row}")
                job.largest_batch(make, direction, row, args.largest_batch)
        return
    made = [(make(batch), directions) for make, directions in todo for batch in args.batch_size]
    if rows and (unknown := set(rows) - {row for problem, _ in made for row in problem.rows(args.full)}):
        known = dict.fromkeys(row for problem, _ in made for row in problem.rows(full=True))
        args.error(f"--rows: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)} (some with --full)")
    total = sum((len(job.names(p)) + 1) * len(directions or p.directions) for p, directions in made)
    with progress(total) as step:
        job.step = step
        for problem, directions in made:
            job.problem(problem, directions)


def run(args) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which measures memory, is chatty
    check_backend(args)
    _defaults(args)
    if args.plot:
        from ..benchmarking.plots import pyplot

        pyplot()  # raises now, not after the measurement

    import torch

    from ..benchmarking import machine, table
    from ..benchmarking.record import Record
    from ..benchmarking.run import DeviceLost

    if args.threads:
        torch.set_num_threads(args.threads)
    args.started = time.monotonic()
    facts = machine.facts(args.device)
    record = Record(args.out, shlex.join(command(args)), facts, args.resume)
    try:
        _measure(args, record, facts)
    except DeviceLost as error:
        _again(args, record, error)
    groups = record.groups()
    if args.plot:
        _plot(groups, args.plot)
    if args.json:
        print(json.dumps(record.result, indent=1))
    else:
        print(table.render(groups))
        for key, text in (("left_out", "left out, --budget was spent"), ("failed", "failed")):
            for name in record.result["machine_info"].get(key, []):
                print(f"{text}: {name}")
    return (
        0 if any(i.get("interleaved_median_ms") or i.get("largest") for g in groups.values() for i in g.values()) else 1
    )


def _again(args, record, error) -> NoReturn:
    """The row that ended the CUDA context is in the record: a new process goes on behind it.

    It takes this one's place, which would hold on to the device's memory as long as it lives.
    """
    restarts = record.result["machine_info"].get("restarts", 0) + 1
    if restarts > RESTARTS:
        raise RuntimeError(f"the device was lost {restarts} times, the last time by {error}")
    print(f"timesformer benchmark: {error}: going on in a new process", file=sys.stderr)
    if record.path is None:
        handle, path = tempfile.mkstemp(prefix="timesformer-benchmark-", suffix=".json")
        os.close(handle)
        record.path = Path(path)
    record.note("restarts", restarts)
    if args.budget is not None:
        args.budget = max(args.budget - (time.monotonic() - args.started), 0.0)
    parts = [sys.executable, "-m", "timesformer.cli", *command(args)[1:], "--out", str(record.path), "--resume"]
    parts += ["--plot", args.plot] if args.plot else []
    parts += ["--json"] if args.json else []
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, parts)


def _plot(groups: dict, path: str) -> None:
    from ..benchmarking import plots

    lengths = {info.get("frames") for rows in groups.values() for info in rows.values()}
    if len(lengths) > 1:
        plots.over_frames(groups, path)
        memory = Path(path).with_stem(Path(path).stem + "-memory")
        if any(info.get("peak_bytes") for rows in groups.values() for info in rows.values()):
            plots.over_frames(groups, memory, "memory")
    else:
        plots.bars(groups, path)
