# SPDX-License-Identifier: Apache-2.0
"""The goals set for attention kernels on an H200, in bfloat16 with cold caches, against what a result holds.

Memory-bound kernels are judged by the bandwidth at which they move the bytes that must move, as a share of a plain
copy's in the same process; space attention at 448 pixels by its arithmetic rate.
"""

from __future__ import annotations

from dataclasses import dataclass

STOCK = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn")  # the long-sequence kernels, without their copies


@dataclass(frozen=True)
class Goal:
    """measure: "copy", a share of the copy's bandwidth; "TFLOP/s"; "stock", times as fast as the best of STOCK."""

    op: str
    direction: str
    frames: tuple[int, ...]
    locations: int | None
    batches: tuple[int, ...]
    measure: str
    asked: float


GOALS = (
    Goal("time attention", "forward", (8, 16), None, (8, 64), "copy", 0.92),
    Goal("time attention", "backward", (8, 16), None, (8, 64), "copy", 0.88),
    Goal("time attention", "forward", (96,), None, (8, 64), "copy", 0.85),
    Goal("time attention", "backward", (96,), None, (8, 64), "copy", 0.75),
    Goal("space attention", "forward", (8, 16, 96), 196, (8,), "copy", 0.80),
    Goal("space attention", "forward", (8, 16, 96), 196, (64,), "copy", 0.85),
    Goal("space attention", "backward", (8, 16, 96), 196, (8, 64), "copy", 0.70),
    Goal("space attention", "forward", (8, 16, 96), 784, (8, 64), "TFLOP/s", 520.0),
    Goal("space attention", "forward", (8, 16, 96), 784, (8, 64), "stock", 1.3),
    Goal("space attention", "backward", (8, 16, 96), 784, (8, 64), "TFLOP/s", 400.0),
)


def device_ms(info: dict) -> float | None:
    """Milliseconds with cold caches: of the CUDA graph where there is one, else of the plain call."""
    return info.get("graph_median_ms") or info.get("interleaved_median_ms")


def reached(goal: Goal, rows: dict[str, dict], row: str) -> float | None:
    """What the row reaches, in the unit of the goal; None where the result does not tell."""
    info = rows[row]
    time = device_ms(info)
    if not time:
        return None
    if goal.measure == "copy":
        return info["bytes"] / info["peak_copy_GBps"] / 1e6 / time if info.get("peak_copy_GBps") else None
    if goal.measure == "TFLOP/s":
        return info["flops"] / time / 1e9
    stock = [device_ms(rows[f"{name}-no-copies"]) for name in STOCK if f"{name}-no-copies" in rows]
    return min(filter(None, stock), default=0.0) / time or None


def render(groups: dict[str, dict[str, dict]], row: str) -> str:
    """A markdown table of every goal that the result can judge. Raises ValueError where there is none."""
    lines = []
    for goal in GOALS:
        for rows in groups.values():
            info = rows.get(row)
            if info is None or info.get("kind") != "attention" or not _meant(goal, info):
                continue
            got = reached(goal, rows, row)
            if got is not None:
                lines.append(_line(goal, info, got))
    if not lines:
        raise ValueError(f"row: the file holds no measurement of {row!r} that a goal speaks of (bfloat16, attention)")
    head = "| goal | asked | measured | |\n| --- | ---: | ---: | --- |"
    return "\n".join([head, *lines])


def _meant(goal: Goal, info: dict) -> bool:
    return (
        (info["op"], info["direction"], info["dtype"]) == (goal.op, goal.direction, "bfloat16")
        and info.get("frames") in goal.frames
        and info.get("batch") in goal.batches
        and goal.locations in (None, info.get("locations"))
        and "12 heads of 64" in info["shape"]
    )


def _line(goal: Goal, info: dict, got: float) -> str:
    form = {"copy": ".0%", "TFLOP/s": ".0f", "stock": ".2f"}[goal.measure]
    unit = {"copy": " of the copy", "TFLOP/s": " TFLOP/s", "stock": " x the best stock kernel"}[goal.measure]
    verdict = "reached" if got >= goal.asked else f"missed by {1 - got / goal.asked:.0%}"
    name = f"{goal.op}, {goal.direction}, {info['shape'].rsplit(', ', 1)[0]}"
    return f"| {name} | {goal.asked:{form}}{unit} | {got:{form}} | {verdict} |"
