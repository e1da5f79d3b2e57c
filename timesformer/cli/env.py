# SPDX-License-Identifier: Apache-2.0
"""`timesformer env`: versions, devices, which backends can run and why the others cannot."""

from __future__ import annotations

import json
from importlib import metadata

from .common import add_command

OPTIONAL = ("av", "tqdm", "safetensors", "huggingface_hub", "transformers", "onnx", "onnxscript", "onnxruntime")


def add(commands) -> None:
    parser = add_command(
        commands,
        "env",
        run,
        "print versions, devices and backends, for a bug report",
        "timesformer env --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def run(args) -> int:
    from timesformer_kernels import info

    report = info.report()
    report["optional"] = {name: _version(name) for name in OPTIONAL}
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(info.render(report))
    print("optional packages")
    for name, version in report["optional"].items():
        print(f"  {name:<{max(map(len, OPTIONAL))}}  {version or 'not installed'}")
    return 0
