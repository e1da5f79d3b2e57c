#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Choose between the GPU backends from measurements: rewrites the rules of choice.json, each with its numbers.

    python scripts/choose_backend.py benchmarks/results/FILE.json ... [--out new.json]

Reads what `timesformer benchmark` and benchmarks/ write, of files and of all in a folder: tables of attention with the
rows of both backends. A present rule says how far one decision reaches: all tables of one architecture, dtype and head
dimension whose sequences it serves, forward and backward alike, decide together, by the geometric mean of the ratios of
their times (of CUDA graphs where both have one). Their decision becomes a rule in front of the present one, or replaces
it where it was made in this way before. Within the noise of the tables the present choice stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from timesformer_kernels import choice
from timesformer_kernels.choice import Rule

ROWS = ("cuda", "triton")
SHAPE = re.compile(r"\d+ heads? of (\d+)$")


@dataclass(frozen=True)
class Table:
    """One group of a result. ms: {row: milliseconds}."""

    group: str
    architecture: str
    dtype: str
    head_dim: int
    members: int
    ms: dict[str, float]
    noise: float
    device: str
    date: str
    file: str


def paths(names: list[Path]) -> list[Path]:
    """The files, and those in the folders, by name."""
    return [path for name in names for path in (sorted(name.glob("*.json")) if name.is_dir() else [name])]


def tables(path: Path) -> list[Table]:
    """Those of a file that compare the two. Raises ValueError naming the file and what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        groups: dict[str, dict[str, dict]] = defaultdict(dict)
        for bench in result["benchmarks"]:
            groups[bench["group"]][bench["extra_info"]["row"]] = bench["extra_info"]
        found = [_table(group, rows, result, path.name) for group, rows in groups.items()]
    except OSError as error:
        raise ValueError(f"file: cannot read {path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"file: {path} is no result of a benchmark: {what}") from error
    return [table for table in found if table is not None]


def _table(group: str, rows: dict[str, dict], result: dict, file: str) -> Table | None:
    info = next(iter(rows.values()))
    size = SHAPE.search(info.get("shape", ""))
    if info.get("kind") != "attention" or info["device"] != "cuda" or info["shape"].startswith("tiny") or not size:
        return None
    # Launches of a plain call hide what short kernels take; but both rows must be timed alike.
    for time, noise in (("graph_median_ms", "graph_noise"), ("interleaved_median_ms", "noise")):
        ms = {row: rows.get(row, {}).get(time) for row in ROWS}
        if all(ms.values()):
            return Table(
                group,
                "sm_" + info["capability"].replace(".", ""),
                info["dtype"],
                int(size[1]),
                info["frames"] if info["op"] == "time attention" else info["locations"] + 1,  # and the class row
                ms,
                max(rows[row].get(noise) or 0.0 for row in ROWS),
                info["chip"],
                result["datetime"][:10],
                file,
            )
    return None


def decided(present: Rule, found: list[Table]) -> Rule:
    """The rule that these tables, all served by the present one, make."""
    means = {row: statistics.fmean(math.log(table.ms[row]) for table in found) for row in ROWS}
    noise = max(table.noise for table in found)
    best = min(ROWS, key=means.get)
    if choice.tie(math.exp(max(means.values()) - means[best]), noise):
        best = present.backend
    (other,) = (row for row in ROWS if row != best)
    first, last = found[0], found[-1]
    facts = {
        "device": last.device,
        "date": last.date,
        "file": ", ".join(dict.fromkeys(table.file for table in found)),
        "ms": {table.group: {row: round(ms, 6) for row, ms in table.ms.items()} for table in found},
        "ratio": round(math.exp(means[other] - means[best]), 4),
        "noise": round(noise, 4),
    }
    span = (first.head_dim, first.head_dim)
    return Rule(first.architecture, (first.dtype,), span, present.members, best, {"measured": facts})


def chosen(rules: tuple[Rule, ...], found: list[Table]) -> tuple[tuple[Rule, ...], list[tuple[Rule, Rule]]]:
    """(the rules with those that the tables make, [(the present rule, the one made of it)])."""
    latest = {(table.group, table.architecture): table for table in found}  # measured again: the last counts
    together: dict[tuple, list[Table]] = defaultdict(list)
    for table in latest.values():
        kind = (table.architecture, table.dtype, table.head_dim)
        fitting = choice.fitting(rules, kind[0], getattr(torch, kind[1]), kind[2])
        if present := choice.find(fitting, table.members):
            together[(*kind, rules.index(present))].append(table)
    changes = [(rules[i], decided(rules[i], group)) for (*_, i), group in together.items()]
    made = {rule[:4] for _, rule in changes}
    old = [rule for rule in rules if rule[:4] not in made]
    front = sorted([*(rule for _, rule in changes), *filter(choice.measured, old)], key=_order)
    return (*front, *(rule for rule in old if not choice.measured(rule))), changes


def _order(rule: Rule) -> tuple:
    ends = (math.inf if end is None else end for end in (*rule.head_dim, *rule.members))
    return (rule.architecture, rule.dtypes, *ends)


def render(rules: tuple[Rule, ...]) -> str:
    """The text of choice.json: two lines a rule."""
    lines = []
    for rule in rules:
        fields = {name: value for name, value in rule._asdict().items() if name != "reason"}
        lines.append(f'{json.dumps(fields)[:-1]},\n  "reason": {json.dumps(rule.reason)}}}')
    return '{"rules": [\n ' + ",\n ".join(lines) + "\n]}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of a benchmark, or a folder of them")
    parser.add_argument("--table", type=Path, default=choice.TABLE, help="the present rules (default: the package's)")
    parser.add_argument("--out", type=Path, help="the new ones (default: over the present)")
    args = parser.parse_args(argv)
    try:
        rules = choice.read(args.table)
        rules, changes = chosen(rules, [table for path in paths(args.files) for table in tables(path)])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out or args.table).write_text(render(rules), encoding="utf-8")
    for before, after in changes:
        stays = "stays" if after.backend == before.backend else f"instead of {before.backend}"
        print(f"{stays}: {after}")
    print(f"{len(changes)} decisions from measurements, {len(rules)} rules" if changes else "no table has both rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
