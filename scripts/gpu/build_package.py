# SPDX-License-Identifier: Apache-2.0
"""Builds the package where it stands, without network: pip if it is usable, else setup.py alone.

Nothing is built where the libraries load and their sources have not changed since.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from probe import Checks, options

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-e", "."]
SETUP = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
INFO = [sys.executable, "-m", "timesformer_kernels.info", "--json"]
HERE = "import importlib.metadata, sys; importlib.metadata.distribution('timesformer-kernels')"


def info() -> dict | None:
    """The package's report on itself, from a process of its own; None where it does not even import."""
    done = subprocess.run(INFO, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr)
        return None
    return json.loads(done.stdout)


def anonymous(line: str) -> str:
    """A result may be published: no paths of this machine."""
    return line.replace(str(ROOT), ".").replace(sys.prefix, "PREFIX").replace(str(Path.home()), "~")[-300:]


def usable(report: dict | None, *names: str) -> bool:
    """Whether the libraries of these names can be used as they are."""
    return report is not None and all(x["ok"] and not x["stale"] for x in map(report["libraries"].get, names))


def main() -> int:
    args = options(__doc__.split(":")[0] + ".")
    checks = Checks(args.json, "steps")
    environment = {"MAX_JOBS": str(len(os.sched_getaffinity(0))), "TIMESFORMER_KERNELS_REQUIRE_NATIVE": "1"}
    installed = subprocess.run([sys.executable, "-c", HERE], cwd=ROOT, capture_output=True).returncode == 0
    libraries = ("_cpu",) if args.cpu else ("_cpu", "_cuda")
    before, way = info(), "up to date, nothing built"
    if not usable(before, *libraries):
        for way, command in (("pip install -e", PIP), ("setup.py build_ext --inplace", SETUP)):
            if way.startswith("pip") and installed:
                continue  # of an earlier build: its sources changed
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
            print(f"+ {way}\n{done.stdout}\n{done.stderr}", flush=True)
            lines = (done.stdout + done.stderr).strip().splitlines()
            checks.facts[way] = {"exit status": done.returncode, "last line": anonymous(lines[-1]) if lines else ""}
            if done.returncode == 0:
                break
    checks.facts["way"] = way
    report = info()
    checks.facts["info"] = report and {key: value for key, value in report.items() if key != "location"}
    library = report["libraries"]["_cpu"] if report else {"ok": False, "reason": "the package does not import"}
    checks.add(
        "native library", usable(report, "_cpu"), library["reason"] or ("stale" if library.get("stale") else "ok")
    )
    device = "cpu" if args.cpu else "cuda"
    reason = report["backends"][device]["bfloat16"]["triton"] if report else "the package does not import"
    checks.add("triton backend", reason is None, reason or "can run")
    native = report["backends"][device]["bfloat16"]["cuda"] if report else "the package does not import"
    checks.add("cuda backend", args.cpu or native is None, native or "can run")
    isas = ", ".join(report["cpu"]["usable_isas"]) if report else ""
    return checks.end(f"{way}; cpu: {isas}; triton can run")


if __name__ == "__main__":
    sys.exit(main())
