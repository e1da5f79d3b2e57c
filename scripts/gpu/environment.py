# SPDX-License-Identifier: Apache-2.0
"""The machine a GPU check runs on: versions, GPU, driver, clocks. Reads, and changes nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata

from probe import Checks, options

PACKAGES = (
    *("torch", "triton", "numpy", "einops", "transformers", "timm", "flash_attn", "xformers", "av", "safetensors"),
    *("huggingface_hub", "hypothesis", "matplotlib", "pytest", "pytest-benchmark", "pytest-xdist", "pytest-timeout"),
    *("setuptools", "ninja", "pip", "timesformer-kernels"),
)
TOOLS = {"nvcc": ["--version"], "compute-sanitizer": ["--version"], "g++": ["--version"], "ninja": ["--version"]}
QUERY = "name,driver_version,compute_cap,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.limit,"
QUERY += "temperature.gpu,ecc.mode.current,mig.mode.current,compute_mode,persistence_mode"
EXCERPT = ("Clocks Event Reasons", "Clocks", "Max Clocks", "Applications Clocks", "ECC Errors", "Remapped Rows")


def said(*command: str) -> str | None:
    """Output of a command, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def sections(text: str) -> dict[str, list[str]]:
    """The named sections of `nvidia-smi -q`: nothing in them names the machine."""
    found, name, depth = {}, None, 0
    for line in text.splitlines():
        indent, title = len(line) - len(line.lstrip()), line.strip()
        if name is not None and title and indent <= depth:
            name = None
        if name is None and title in EXCERPT and title not in found:
            name, depth = title, indent
            found[name] = []
        elif name is not None and title:
            found[name].append(re.sub(r"\s+:\s+", ": ", title))
    return found


def main() -> int:
    args = options(__doc__.split(":")[0] + ".")
    checks = Checks(args.json, "facts")
    import torch

    versions = {name: found for name in PACKAGES if (found := version(name))}
    tools = {}
    for name, flags in TOOLS.items():
        path = shutil.which(name)
        lines = (said(path, *flags) or "").splitlines() if path else []
        tools[name] = next((x.strip() for x in lines if re.search(r"\d+\.\d+", x) and "Copyright" not in x), path)
    cores = len(os.sched_getaffinity(0))
    checks.facts |= {"python": platform.python_version(), "platform": platform.platform(), "cores": cores}
    checks.facts |= {"versions": versions, "missing": [n for n in PACKAGES if n not in versions], "tools": tools}
    checks.facts |= {"cuda": torch.version.cuda, "torch_gpus": torch.cuda.device_count()}
    checks.add("torch", True, f"{torch.__version__}, Python {platform.python_version()}, {cores} cores")
    identity = {"python": platform.python_version(), "torch": torch.__version__, "triton": versions.get("triton")}
    if args.cpu:
        identity["device"] = device = platform.machine()
    else:
        properties = torch.cuda.get_device_properties(0)
        identity["device"] = device = properties.name
        names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
        checks.facts["gpu"] = {name: getattr(properties, name, None) for name in names}
        with checks.check("works"):
            x = torch.randn(256, 256, device="cuda")
            torch.testing.assert_close((x @ x).cpu(), x.cpu() @ x.cpu(), rtol=1e-2, atol=1e-1)
    if smi := shutil.which("nvidia-smi"):
        line = said(smi, f"--query-gpu={QUERY}", "--format=csv,noheader") or ""
        values = [dict(zip(QUERY.split(","), row.split(", "), strict=False)) for row in line.splitlines()]
        checks.facts["nvidia-smi"] = {"gpus": values, "sections": sections(said(smi, "-q") or "")}
    checks.facts["identity"] = identity
    return checks.end(f"{device}, torch {torch.__version__}, triton {versions.get('triton')}")


if __name__ == "__main__":
    sys.exit(main())
