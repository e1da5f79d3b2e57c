# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal, of a run just made."""

from __future__ import annotations

import math

ABSENT = "-"
NOT_TIMED_AGAINST = ("copy", "products")


def fixed(value: float | None, form: str = ".3f") -> str:
    return ABSENT if value is None else format(value, form)


def mib(value: int | None) -> str:
    return fixed(None if value is None else value / 2**20, ".1f")


def ratio(time: float | None, base: float | None, noise: float | None) -> str:
    """How many times as long as `base`; "~1" where the difference is within what two measurements of one row differ."""
    if not time or not base:
        return ABSENT
    return "~1" if abs(math.log(time / base)) <= math.log1p(noise or 0.0) else f"{time / base:.2f}"


COLUMNS = {
    "cold ms": lambda info, base: fixed(info.get("interleaved_median_ms")),
    "x": lambda info, base: ratio(
        info.get("interleaved_median_ms"), base.get("interleaved_median_ms"), info.get("noise")
    ),
    "warm ms": lambda info, base: fixed(info.get("warm_median_ms")),
    "graph ms": lambda info, base: fixed(info.get("graph_median_ms")),
    "of floor": lambda info, base: fixed(info.get("floor_share"), ".0%"),
    "peak MiB": lambda info, base: mib(info.get("peak_bytes")),
    "saved MiB": lambda info, base: mib(info.get("saved_bytes")),
    "max error": lambda info, base: fixed(info.get("max_err"), ".1e"),
    "bitwise": lambda info, base: {True: "yes", False: "no"}.get(info.get("deterministic"), ABSENT),
}


def render(groups: dict[str, dict[str, dict]]) -> str:
    """Every group: measured rows with what they cost, then what could not run and why.

    x: times as long as the first row. of floor: the least time that bytes and FLOP need, over the cold time.
    """
    return "\n\n".join(_group(group, rows) for group, rows in groups.items())


def _group(group: str, rows: dict[str, dict]) -> str:
    if any(info.get("kind") == "largest" for info in rows.values()):
        return _largest(group, rows)
    timed = {row: info for row, info in rows.items() if info.get("interleaved_median_ms") is not None}
    failed = {row: info["reason"] for row, info in rows.items() if row not in timed}
    lines = [_title(group, timed)]
    if timed:
        base = next(iter(timed.values()))
        cells = [[row, *(show(info, base) for show in COLUMNS.values())] for row, info in timed.items()]
        kept = [0, *(i for i in range(1, len(COLUMNS) + 1) if any(line[i] != ABSENT for line in cells))]
        lines += _aligned([[["", *COLUMNS][i] for i in kept], *([line[i] for i in kept] for line in cells)])
    lines += [f"  {row}: not measured: {reason}" for row, reason in failed.items()]
    return "\n".join(lines)


def _title(group: str, timed: dict[str, dict]) -> str:
    facts = next(iter(timed.values()), {})
    said = [f"floor {info['floor_ms']:.3f} ms" for info in [facts] if info.get("floor_ms")]
    said += [f"noise {facts['noise']:.1%}"] if facts.get("noise") is not None else []
    return group + (f"  ({', '.join(said)})" if said else "")


def _largest(group: str, rows: dict[str, dict]) -> str:
    lines = [
        [row, fixed(info.get("largest"), "d"), info.get("reason") or "not tried further"] for row, info in rows.items()
    ]
    return "\n".join([group, *_aligned([["", "largest", "what stops it"], *lines], left=(0, 2))])


def _aligned(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    pad = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return ["  " + "  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in lines]
