# SPDX-License-Identifier: Apache-2.0
"""The `timesformer` command. Exit codes: 0 done, 1 it could not be done (one line on stderr), 2 wrong usage."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata

from . import attention, benchmark, classify, convert, demo, env, evaluate, features, train

COMMANDS = (attention, benchmark, classify, convert, demo, env, evaluate, features, train)


def _version() -> str:
    try:
        return metadata.version("timesformer-kernels")
    except metadata.PackageNotFoundError:  # run from a source tree
        from timesformer_kernels import __version__

        return __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timesformer",
        description="TimeSformer on fused divided space-time attention.",
        epilog="example: timesformer demo\n\n`timesformer COMMAND --help` describes one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timesformer-kernels {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = argv  # the exact command, for records
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("timesformer: interrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"timesformer {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
