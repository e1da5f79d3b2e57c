# SPDX-License-Identifier: Apache-2.0
"""The machine: its facts, and the rates that a plain copy and a matrix product reach on it in this process."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from timesformer_kernels import __version__, native

from .timing import interleave, summary, watch_of

MIB = 2**20
PACKAGES = ("triton", "transformers", "flash_attn", "xformers", "numpy")


def chip(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def facts(device: str) -> dict:
    """Device, versions and settings. Nothing that identifies the machine beyond its kind."""
    found = {
        "device": device,
        "chip": chip(device),
        "isa": native.isa() if device == "cpu" and native.library()[0] else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": __version__,
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device == "cpu":
        return {**found, "torch_isa": torch.backends.cpu.get_cpu_capability()}
    major, minor = torch.cuda.get_device_capability()
    return {
        **found,
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "l2_bytes": getattr(torch.cuda.get_device_properties(0), "L2_cache_size", None),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class Ceilings:
    """Rates in GB/s and GFLOP/s: a copy, bytes read plus bytes written, and a square product, random data in both.

    Measured at first use, each dtype once. small: sizes that measure nothing, for tests.
    """

    def __init__(self, device: str, small: bool = False):
        self.device = device
        gpu = device == "cuda"
        self.copy_bytes = MIB if small else (1024 if gpu else 256) * MIB
        self.side = 64 if small else (8192 if gpu else 1024)
        self.seconds = 0.0 if small else 0.5
        self._rates: dict = {}

    def rates(self, dtype: torch.dtype) -> dict:
        return {
            "peak_copy_GBps": self._once("copy", self._copy),
            "peak_copy_MiB": self.copy_bytes // MIB,
            "peak_matmul_GFLOPps": self._once(dtype, lambda: self._matmul(dtype)),
            "peak_matmul_side": self.side,
        }

    def _once(self, key, measure):
        if key not in self._rates:
            self._rates[key] = measure()
        return self._rates[key]

    def _copy(self) -> float:
        source = torch.randn(self.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source)) / 1e9

    def _matmul(self, dtype: torch.dtype) -> float:
        a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * self.side**3 / self._best(lambda: torch.mm(a, b, out=out)) / 1e9

    def _best(self, call) -> float:
        """Of repeated calls the best, so that a busy machine does not lower the ceiling; on a GPU the median."""
        watch = watch_of(self.device)
        times = summary(interleave({"it": call}, seconds=self.seconds, watch=watch, cold=False)["it"])
        return times["median_ms" if self.device == "cuda" else "min_ms"] / 1e3


def shares(median_ms: float, flops: int | None, nbytes: int | None, rates: dict) -> dict:
    """How near a time is to the floor: the longer of bytes at the copy's rate and FLOP at the product's."""
    copy = nbytes / rates["peak_copy_GBps"] / 1e6 if nbytes else None  # ms
    matmul = flops / rates["peak_matmul_GFLOPps"] / 1e6 if flops else None
    floor = max(filter(None, (copy, matmul)), default=None)
    return {
        "floor_ms": floor,
        "floor_share": floor / median_ms if floor else None,
        "copy_share": copy / median_ms if copy else None,
        "matmul_share": matmul / median_ms if matmul else None,
    }
