# SPDX-License-Identifier: Apache-2.0
"""What this installation can run, and why the rest cannot: `python -m timesformer_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, choice, native, native_cuda, registry

HEAD_DIM = 64  # that of every published TimeSformer
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PREFIXES = ("TIMESFORMER_KERNELS_", "TRITON_")


def _version(distribution: str) -> str | None:
    """Installed version without importing the package; None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _stale(build: dict) -> bool | None:
    """Whether csrc changed after the build; None where the sources do not lie beside the package (not editable)."""
    csrc = Path(__file__).parents[2] / "csrc"
    if "source_hash" not in build or not (csrc / "abi.h").exists():
        return None
    digest = hashlib.sha256()  # as source_hash() in setup.py
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16] != build["source_hash"]


def _libraries() -> dict:
    """Per native library: whether it can be called, else why not, and what the build recorded."""
    build = native.build_info()
    stale = _stale(build)
    found = {"_cpu": native.library(), "_cuda": native_cuda.library()}
    return {
        name: {"ok": lib is not None, "reason": reason, "stale": stale if lib else None, "build": build.get(name)}
        for name, (lib, reason) in found.items()
    }


def _gpus() -> list[dict]:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in properties]


def _backends(device_type: str) -> dict:
    """{dtype: {backend: None if it can run at head_dim 64, else the reason}}."""
    return {
        str(dtype).removeprefix("torch."): {
            name: registry.get(name).why_not(device_type, dtype, HEAD_DIM) for name in registry.available_backends()
        }
        for dtype in DTYPES
    }


def _auto(device_type: str) -> dict:
    """{dtype: what auto takes at head_dim 64}."""
    device = torch.device(device_type, 0)  # of several GPUs the first
    return {str(dtype).removeprefix("torch."): registry.taken(device, dtype, HEAD_DIM) for dtype in DTYPES}


def _choice() -> dict:
    """The rules by which auto chooses between the backends of a GPU, in words, and how many of them were measured."""
    rules = choice.rules()
    return {"rules": [str(rule) for rule in rules], "measured": sum(map(choice.measured, rules))}


def report() -> dict:
    """Everything the command prints, as JSON-ready values; absent things are None."""
    gpus = _gpus() if torch.cuda.is_available() else []
    libraries = _libraries()
    usable = libraries["_cpu"]["ok"]
    devices = ("cpu", "cuda") if gpus else ("cpu",)
    return {
        "version": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": {"torch_built_for": torch.version.cuda, "available": torch.cuda.is_available(), "gpus": gpus},
        "cpu": {
            "isa": native.isa() if usable else None,
            "usable_isas": list(native.isas()) if usable else [],
            "threads": torch.get_num_threads(),
        },
        "libraries": libraries,
        "backends": {device: _backends(device) for device in devices},
        "auto": {device: _auto(device) for device in devices},
        "choice": _choice(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"  {name:<{width}}  {text}" for name, text in pairs]


def _verdict(library: dict) -> str:
    stale = "; stale: csrc changed after the build, reinstall the package" if library["stale"] else ""
    return ("ok" if library["ok"] else library["reason"]) + stale


def render(info: dict) -> str:
    """The report as text for a terminal or a bug report."""
    cuda, cpu = info["cuda"], info["cpu"]
    built_for = cuda["torch_built_for"] or "a torch without CUDA"
    gpus = ", ".join(f"{g['name']} ({g['capability']}, {g['memory_bytes'] / 2**30:.0f} GiB)" for g in cuda["gpus"])
    isas = f"{cpu['isa']} (usable: {', '.join(cpu['usable_isas'])})" if cpu["isa"] else "none: no CPU library"
    lines = [f"timesformer-kernels {info['version']}"]
    lines += _rows(
        [
            ("location", info["location"]),
            ("python", f"{info['python']} on {info['platform']}"),
            ("torch", f"{info['torch']}, {cpu['threads']} threads"),
            ("triton", info["triton"] or "not installed"),
            ("GPUs", gpus or f"none available ({built_for})"),
            ("CPU instructions", isas),
        ]
    )
    lines.append("native libraries")
    lines += _rows([(name, _verdict(library)) for name, library in info["libraries"].items()])
    for device, dtypes in info["backends"].items():
        lines.append(f"backends on {device} at head_dim {HEAD_DIM}, in the order in which auto tries them")
        by_reason = {}  # one line where the answer is the same for every dtype
        for dtype, answers in dtypes.items():
            for name, reason in answers.items():
                by_reason.setdefault((name, reason or "can run"), []).append(dtype)
        for dtype, name in info["auto"][device].items():
            by_reason.setdefault(("auto", f"takes {name}"), []).append(dtype)
        lines += _rows([(name, f"{answer} [{', '.join(names)}]") for (name, answer), names in by_reason.items()])
    rules, measured = info["choice"]["rules"], info["choice"]["measured"]
    lines.append(
        f"rules by which auto chooses on GPUs, {len(rules)}, of which measured: {measured}; the first that fits"
    )
    lines += _rows([tuple(rule.split(": ", 1)) for rule in rules])
    lines.append("environment")
    lines += _rows(list(info["environment"].items()) or [(", ".join(f"{prefix}*" for prefix in PREFIXES), "none set")])
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m timesformer_kernels.info", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    info = report()
    print(json.dumps(info, indent=2) if parser.parse_args(argv).json else render(info))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
