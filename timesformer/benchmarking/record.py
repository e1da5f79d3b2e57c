# SPDX-License-Identifier: Apache-2.0
"""The file of a run, in the form of pytest-benchmark's: written anew after every row, so that a killed run keeps all.

    {"machine_info": {"command", facts...}, "datetime", "benchmarks": [{"name", "group", "stats", "extra_info"}]}

stats.median are the seconds of warm calls. A row that could not be measured has its "reason" and no times.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path

FORM = "an object with machine_info, datetime and benchmarks"


class Record:
    """Rows by (group, row). path None keeps them in memory alone."""

    def __init__(self, path: str | os.PathLike | None, command: str, facts: dict, resume: bool = False):
        """resume: go on with the rows that `path` has, if it exists. Raises ValueError where it is something else."""
        self.path = Path(path) if path is not None else None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.result = {"machine_info": {"command": command, **facts}, "datetime": now, "benchmarks": []}
        if resume and self.path is not None and self.path.exists():
            self.result = self._read()
        self._rows = {(bench["group"], bench["extra_info"]["row"]): bench for bench in self.result["benchmarks"]}

    def _read(self) -> dict:
        try:
            result = json.loads(self.path.read_text(encoding="utf-8"))
            [(bench["group"], bench["extra_info"]["row"]) for bench in result["benchmarks"]]
            return result
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: not a record to resume, expected {FORM}") from error

    def get(self, group: str, row: str) -> dict | None:
        """extra_info of a row, or None."""
        bench = self._rows.get((group, row))
        return bench["extra_info"] if bench else None

    def add(self, group: str, row: str, info: dict, warm_ms: float | None = None) -> None:
        """Add or replace a row, and write the file."""
        self._rows[group, row] = {
            "name": f"{group} {row}",
            "group": group,
            "stats": {} if warm_ms is None else {"median": warm_ms / 1e3},
            "extra_info": {"row": row, **info},
        }
        self.result["benchmarks"] = list(self._rows.values())
        self.write()

    def note(self, key: str, value) -> None:
        """Say something about the run as a whole."""
        self.result["machine_info"][key] = value
        self.write()

    def write(self) -> None:
        """Whole or not at all: a reader, or the next run, never finds half a file."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def groups(self) -> dict[str, dict[str, dict]]:
        """{group: {row: extra_info}} with warm_median_ms, in the order of the file."""
        found: dict[str, dict[str, dict]] = {}
        for bench in self.result["benchmarks"]:
            warm = bench.get("stats", {}).get("median")
            info = {**bench["extra_info"], "warm_median_ms": warm * 1e3 if warm else None}
            found.setdefault(bench["group"], {})[info["row"]] = info
        return found
