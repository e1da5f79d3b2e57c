# SPDX-License-Identifier: Apache-2.0
"""What the commands share: argument types and progress on stderr."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand that calls run(args) -> exit code; its help ends with an example."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, error=parser.error)
    return parser


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def count(text: str) -> int:
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 0")
    return value


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, or one that `timesformer env` lists (default: auto)")


def check_backend(args) -> None:
    """Wrong usage, exit code 2, for a backend that does not exist. One that cannot run is a run-time error."""
    from timesformer_kernels import available_backends

    if args.backend not in ("auto", *available_backends()):
        args.error(f"--backend: got {args.backend!r}, expected one of auto, {', '.join(available_backends())}")


class _Lines:
    """The part of tqdm used here, for installations without it: one line on stderr for each description."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def set_description(self, text: str) -> None:
        print(f"[{self.done + 1}/{self.total}] {text}", file=sys.stderr)

    def update(self) -> None:
        self.done += 1


@contextmanager
def progress(total: int):
    """Yield step(text): announces what is done next; `total` steps in all. A tqdm bar on stderr where installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None:
        bar = _Lines(total)
    else:
        bar = tqdm(total=total, file=sys.stderr, bar_format="{desc:<34} {bar} {n_fmt}/{total_fmt} [{elapsed}]")
    started = False

    def step(text: str) -> None:
        nonlocal started
        if started:
            bar.update()
        started = True
        bar.set_description(text)

    try:
        yield step
        if started:
            bar.update()
    finally:
        if tqdm is not None:
            bar.close()
