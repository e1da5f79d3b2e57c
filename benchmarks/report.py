# SPDX-License-Identifier: Apache-2.0
"""The README's tables from a committed result: `python benchmarks/report.py benchmarks/results/FILE.json`.

Cold: medians of interleaved rounds, in which every call finds its operands gone from the near caches, as in a model.
Warm: medians of one row called again and again. Ratios are between rows of one group of one run. Needs no package.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NEEDED = ("kind", "op", "row", "shape", "dtype", "direction", "chip", "threads", "torch", "interleaved_median_ms")
ABSENT = "–"


def load(path: Path) -> dict:
    """The JSON of pytest-benchmark. Raises ValueError naming the file and what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"file: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"file: {path} is not JSON: {error}") from error
    rows = result.get("benchmarks") if isinstance(result, dict) else None
    if not rows:
        raise ValueError(f"file: {path} holds no benchmarks, expected a file written by --benchmark-json")
    for row in rows:
        missing = [name for name in NEEDED if name not in row.get("extra_info", {})]
        if missing:
            raise ValueError(f"file: {path}: {row.get('name')} lacks {', '.join(missing)}")
        if row["extra_info"]["kind"] not in TABLES:
            kind = row["extra_info"]["kind"]
            raise ValueError(f"file: {path}: {row.get('name')} has kind {kind!r}, expected one of {', '.join(TABLES)}")
    return result


def groups(result: dict) -> dict[str, dict[str, dict]]:
    """{group: {row: extra_info}}, in the order of the file."""
    found: dict[str, dict[str, dict]] = {}
    for bench in result["benchmarks"]:
        info = {**bench["extra_info"], "warm_median_ms": bench.get("stats", {}).get("median", 0) * 1e3 or None}
        found.setdefault(bench["group"], {})[info["row"]] = info
    return found


def ratio(rows: dict[str, dict], other: str, row: str, time: str, form: str = ".2f") -> str:
    """How many times as long `other` takes as `row`, by `time`, cold or warm."""
    ours, theirs = rows[row].get(time), rows.get(other, {}).get(time)
    return number(theirs / ours if ours and theirs else None, form)


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def caption(rows: dict[str, dict], result: dict) -> str:
    """Chip, dtype, shape, threads, date, torch version, command: what a number means nothing without."""
    facts = next(iter(rows.values()))
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    setting = [facts["shape"], facts["chip"] + (f" ({facts['isa']})" if facts.get("isa") else ""), threads]
    setting.append(f"torch {facts['torch']}")
    if facts.get("allocator"):
        setting.append(f"malloc {facts['allocator']}")
    setting += [result.get("datetime", "")[:10] or "date unknown"]
    command = result.get("machine_info", {}).get("command", "pytest benchmarks/ --benchmark-only")
    title = f"{facts['op'][0].upper()}{facts['op'][1:]}, {facts['direction']}, {facts['dtype']}"
    return f"**{title}.** {'; '.join(setting)}; `{command}`"


def attention(rows: dict[str, dict]) -> str:
    """Ratios above 1: so many times faster than that row. Copy: share of the bandwidth at which a plain copy moves the
    bytes that a kernel must move."""
    errors = {"max_err": "max error", "max_err_grad": "of gradients"}
    errors = {key: name for key, name in errors.items() if any(info.get(key) is not None for info in rows.values())}
    header = ["", "cold ms", "x sdpa", "x eager", "copy", "warm ms", "x sdpa", "x eager", "copy", *errors.values()]
    lines = []
    for row, info in rows.items():
        cells = [row]
        for time in ("interleaved_median_ms", "warm_median_ms"):
            cells.append(number(info.get(time), ".2f"))
            cells += [ratio(rows, other, row, time) for other in ("sdpa", "eager")]
            cells.append(ratio(rows, "copy", row, time, ".0%"))
        # A copy computes nothing that could be wrong.
        lines.append(cells + [number(None if row == "copy" else info.get(key), ".1e") for key in errors])
    return table(header, lines)


def model(rows: dict[str, dict]) -> str:
    header = ["", "median ms", "x time of the products", "x time of huggingface", "peak MiB", "x memory of huggingface"]
    products, theirs = rows.get("products"), rows.get("huggingface", {})
    lines = []
    for row, info in rows.items():
        time, peak = info["interleaved_median_ms"], info.get("peak_bytes")
        beside = [
            number(time / other["interleaved_median_ms"] if other else None, ".2f") for other in (products, theirs)
        ]
        memory = peak / theirs["peak_bytes"] if peak and theirs.get("peak_bytes") else None
        mib = number(peak / 2**20 if peak else None, ".1f")
        lines.append([row, f"{time:.1f}", *beside, mib, number(memory, ".0%")])
    return table(header, lines)


def overhead(rows: dict[str, dict]) -> str:
    lines = [[row, f"{info['interleaved_median_ms'] * 1e3:.1f}"] for row, info in rows.items()]
    return table(["", "microseconds per call"], lines)


TABLES = {"attention": attention, "model": model, "overhead": overhead}


def render(result: dict) -> str:
    """Every group as a caption and a table, in markdown."""
    parts = []
    for rows in groups(result).values():
        kind = next(iter(rows.values()))["kind"]
        parts.append(caption(rows, result) + "\n\n" + TABLES[kind](rows))
    return "\n\n".join(parts)


def summary(result: dict, row: str = "cpp") -> str:
    """One line of attention per group, for one row, and the tables of the other kinds that have one worth reading."""
    header = first = None
    lines, others = [], []
    for rows in groups(result).values():
        facts = next(iter(rows.values()))
        if facts["kind"] == "model":
            others.append(caption(rows, result) + "\n\n" + TABLES["model"](rows))
        elif facts["kind"] == "attention" and row in rows:
            cells = [line.strip("| ").split(" | ") for line in attention(rows).splitlines()]
            (mine,) = (line for line in cells[2:] if line[0] == row)
            header, first = ["", *cells[0][:8]], first or rows
            lines.append([f"{facts['op']}, {facts['direction']}, {facts['dtype']}", *mine[1:9]])
    if not lines:
        raise ValueError(f"row: no attention row {row!r} in this file")
    title = caption(first, result).split("** ", 1)[1]
    return "\n\n".join([f"**`{row}`.** {title}\n\n" + table(header, lines), *others])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("file", type=Path, help="JSON written by --benchmark-json")
    parser.add_argument("--summary", action="store_true", help="the README's tables: one line per group")
    arguments = parser.parse_args(argv)
    try:
        print((summary if arguments.summary else render)(load(arguments.file)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
