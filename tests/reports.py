# SPDX-License-Identifier: Apache-2.0
"""The benchmarks and their report as a user runs them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "report.py"


def python(*args, **env):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**inherited, **env}
    )


def report(*args):
    return python(REPORT, *args)
