# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result: bars against peers with the floor drawn in, and time or memory over the number of frames."""

from __future__ import annotations

from pathlib import Path

OURS, THEIRS, YARDSTICK, FLOOR = "#1b6ca8", "#a9b0b7", "#8fc1a9", "#c1272d"
REFERENCE, BARE = "#a9cbe3", "#dde0e3"  # our specification, which is not meant to be fast; a peer without its copies
LINES = ("#d98200", "#2e8b57", "#8e44ad", "#8c564b", "#d4526e", "#6b6b6b", "#a89a00", "#17a2a2")  # of peers
OWN_ROWS = ("cuda", "triton", "cpp", "reference")
YARDSTICKS = ("copy", "products")
MARKS = "osD^vP*X<>"


def pyplot():
    """matplotlib.pyplot, drawing to files. Raises ImportError that says what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'timesformer-kernels[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def is_ours(row: str) -> bool:
    return row in OWN_ROWS or row.startswith("ours")


def colour(row: str) -> str:
    if is_ours(row):
        return REFERENCE if row.endswith("reference") else OURS
    return YARDSTICK if row in YARDSTICKS else BARE if row.endswith("-no-copies") else THEIRS


def best_time(info: dict) -> float | None:
    """Milliseconds: cold caches; of the CUDA graph where there is one, which leaves out launches on both sides."""
    return info.get("graph_median_ms") or info.get("interleaved_median_ms")


def bars(groups: dict[str, dict[str, dict]], path: str | Path, columns: int = 2) -> None:
    """One panel a group: a bar a row, fastest on top, the floor as a line, rows that could not run named below.

    groups: {group: {row: extra_info}}. Raises ValueError where no row was measured.
    """
    panels = {g: rows for g, rows in groups.items() if any(best_time(info) for info in rows.values())}
    if not panels:
        raise ValueError("plot: no row of this run was measured")
    plt = pyplot()
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    most = max(sum(1 for info in rows.values() if best_time(info)) for rows in panels.values())
    size = (7.2 * columns, lines * (1.6 + 0.27 * most))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (group, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, group, rows)
    facts = next(iter(next(iter(panels.values())).values()))
    figure.suptitle(subtitle(facts), fontsize=9)
    _save(plt, figure, path)


def subtitle(facts: dict) -> str:
    versions = facts.get("versions", {})
    parts = [facts.get("chip", ""), f"torch {facts['torch']}" if facts.get("torch") else ""]
    parts += [f"triton {versions['triton']}"] if facts.get("device") == "cuda" and "triton" in versions else []
    return "; ".join(filter(None, parts))


def _panel(axis, group: str, rows: dict[str, dict]) -> None:
    timed = sorted(((best_time(i), row, i) for row, i in rows.items() if best_time(i)), key=lambda it: it[0])
    names = [row for _, row, _ in timed]
    times = [time for time, _, _ in timed]
    axis.barh(names, times, color=[colour(row) for row in names], height=0.72)
    axis.invert_yaxis()
    longest = times[-1]
    wide = longest > 8 * times[len(times) // 2]  # one slow row would flatten all others
    if wide:
        axis.set_xscale("log")
        axis.set_xlim(0.6 * min(times), 2.5 * longest)
        _plain_ticks(axis.xaxis)
    else:
        axis.set_xlim(0, 1.18 * longest)
    for place, time in enumerate(times):
        axis.annotate(f"{time:.3g}", (time, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    floors = [info["floor_ms"] for _, row, info in timed if info.get("floor_ms") and row not in YARDSTICKS]
    if floors:
        floor = min(floors)
        if wide:
            axis.set_xlim(left=0.6 * min(floor, *times))
        axis.axvline(floor, color=FLOOR, linewidth=1.2, linestyle="--")
        axis.annotate(
            f"floor {floor:.3g}", (floor, 1.0), (2, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=FLOOR, fontsize=7,
        )  # fmt: skip
    unable = [row for row in rows if row not in names]
    label = "ms, cold caches" + (" (log)" if wide else "")
    axis.set_xlabel(label + (f"\nnot measured: {_wrapped(unable)}" if unable else ""), fontsize=7)
    axis.set_title(group, fontsize=9, loc="left", pad=14)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axis) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, which may span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _wrapped(names: list[str], width: int = 90) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(", ".join(names), width))


def over_frames(groups: dict[str, dict[str, dict]], path: str | Path, quantity: str = "time") -> None:
    """Lines over T, one panel for every op, size, dtype and direction that has two values of T or more.

    quantity: "time" (milliseconds, with the floor) or "memory" (peak MiB of a call). Raises ValueError where there is
    nothing to draw.
    """
    value = {"time": best_time, "memory": lambda info: _mib(info.get("peak_bytes"))}[quantity]
    panels: dict[tuple, dict[str, dict[int, dict]]] = {}
    for rows in groups.values():
        for row, info in rows.items():
            if info.get("frames") and value(info) and row != "copy":
                key = tuple(info[k] for k in ("op", "locations", "batch", "dtype", "direction"))
                panels.setdefault(key, {}).setdefault(row, {})[info["frames"]] = info
    panels = {key: rows for key, rows in panels.items() if any(len(points) > 1 for points in rows.values())}
    if not panels:
        raise ValueError("plot: no table of this run has two lengths, see --frames")
    plt = pyplot()
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(8.2 * columns, 4.0 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, rows) in zip(axes.flat, panels.items(), strict=False):
        _lines(axis, key, rows, value, quantity)
    figure.suptitle(subtitle(next(iter(next(iter(next(iter(panels.values())).values())).values()))), fontsize=9)
    _save(plt, figure, path)


def _mib(nbytes: int | None) -> float | None:
    return nbytes / 2**20 if nbytes else None


def notable(rows: dict[str, dict[int, dict]], value, most: int = 7) -> list[str]:
    """Rows worth a line: ours, what people start from, and every peer that is the best of some length.

    A row without copies does less than the others, and our reference is a specification.
    """
    whole = [row for row in rows if not row.endswith(("-no-copies", "reference"))]
    mine = [row for row in whole if is_ours(row)]
    usual = [row for row in whole if row in ("sdpa", "eager", "huggingface", "products")]
    peers = [row for row in whole if row not in mine and row not in YARDSTICKS]
    best = []
    for t in sorted({t for points in rows.values() for t in points}):
        here = [row for row in peers if t in rows[row]]
        best += [min(here, key=lambda row, t=t: value(rows[row][t]))] if here else []
    return list(dict.fromkeys([*mine, *usual, *best]))[: most + len(mine)]


def _lines(axis, key: tuple, rows: dict[str, dict[int, dict]], value, quantity: str) -> None:
    op, locations, batch, dtype, direction = key
    frames = sorted({t for points in rows.values() for t in points})
    for number, row in enumerate(notable(rows, value)):
        points = rows[row]
        ts = sorted(points)
        theirs = dict(color=LINES[number % len(LINES)], linewidth=1.2)
        style = dict(color=OURS, linewidth=2.4, zorder=3) if is_ours(row) else theirs
        mark = MARKS[number % len(MARKS)]
        axis.plot(ts, [value(points[t]) for t in ts], marker=mark, markersize=4.5, label=row, **style)
    if quantity == "time":
        floors = {t: points[t]["floor_ms"] for row, points in rows.items() if row not in YARDSTICKS for t in points}
        if all(floors.values()):
            ts = sorted(floors)
            axis.plot(ts, [floors[t] for t in ts], color=FLOOR, linestyle="--", linewidth=1.2, label="floor")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(frames, [str(t) for t in frames])
    axis.minorticks_off()
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("frames", fontsize=8)
    axis.set_ylabel("ms, cold caches" if quantity == "time" else "peak MiB of a call", fontsize=8)
    axis.set_title(f"{op}, {direction}, {dtype}, B={batch}, N={locations}", fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.grid(True, color="#e5e5e5", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _save(plt, figure, path: str | Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
