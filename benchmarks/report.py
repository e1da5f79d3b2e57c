# SPDX-License-Identifier: Apache-2.0
"""The README's tables and plots from a committed result: `python benchmarks/report.py benchmarks/results/FILE.json`.

Cold: medians of interleaved rounds, in which every call finds its operands gone from the near caches, as in a model.
Warm: medians of one row called again and again. Graph: as cold, from a CUDA graph, which leaves out launches. Ratios
are between rows of one group of one run; "~" marks one within the noise, by which two measurements of one row differ.
Floor: the longer of the least bytes at the rate of a plain copy and the FLOP at that of a matrix product, both measured
in the same process. Tables need no package; plots need this one and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import goals

NEEDED = ("kind", "op", "row", "shape", "dtype", "direction", "chip", "threads", "torch", "interleaved_median_ms")
ABSENT = "–"
NOISE = {"warm_median_ms": "warm_noise", "graph_median_ms": "graph_noise"}
OWN_ROWS, YARDSTICKS = ("cuda", "triton", "cpp", "reference"), ("copy", "products")


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
    """How many times as long `other` takes as `row`, by `time`, cold or warm; "~" within the noise of the group."""
    ours, theirs = rows[row].get(time), rows.get(other, {}).get(time)
    near = ours and theirs and row != other and form.endswith("f") and within_noise(theirs / ours, rows[row], time)
    return ("~" if near else "") + number(theirs / ours if ours and theirs else None, form)


def within_noise(quotient: float, info: dict, time: str) -> bool:
    noise = info.get(NOISE.get(time, "noise"), info.get("noise"))
    return abs(math.log(quotient)) <= math.log1p(noise or 0.0)


def is_ours(row: str) -> bool:
    return row in OWN_ROWS or row.startswith("ours")


def measured(rows: dict[str, dict]) -> dict[str, dict]:
    return {row: info for row, info in rows.items() if info["interleaved_median_ms"] is not None}


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def caption(rows: dict[str, dict], result: dict) -> str:
    """Chip, dtype, shape, threads, date, torch version, command: what a number means nothing without."""
    facts = next(iter(rows.values()))
    setting = [facts["shape"], facts["chip"] + (f" ({facts['isa']})" if facts.get("isa") else "")]
    if facts.get("device") != "cuda":
        setting.append(f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}")
    setting.append(f"torch {facts['torch']}")
    if facts.get("device") == "cuda" and "triton" in facts.get("versions", {}):
        setting.append(f"triton {facts['versions']['triton']}")
    if facts.get("allocator"):
        setting.append(f"malloc {facts['allocator']}")
    setting += [result.get("datetime", "")[:10] or "date unknown"]
    command = result.get("machine_info", {}).get("command", "pytest benchmarks/ --benchmark-only")
    if facts.get("noise") is not None:
        setting.append(f"noise {facts['noise']:.1%}")
    title = f"{facts['op'][0].upper()}{facts['op'][1:]}, {facts['direction']}, {facts['dtype']}"
    return f"**{title}.** {'; '.join(setting)}; `{command}`"


def attention(rows: dict[str, dict]) -> str:
    """Ratios above 1: so many times faster than that row. Copy: share of the bandwidth at which a plain copy moves the
    bytes that a kernel must move."""
    errors = {"max_err": "max error", "max_err_grad": "of gradients"}
    errors = {key: name for key, name in errors.items() if any(info.get(key) is not None for info in rows.values())}
    header = ["", "cold ms", "x sdpa", "x eager", "copy", "warm ms", "x sdpa", "x eager", "copy", *errors.values()]
    lines = []
    for row, info in measured(rows).items():
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
    rows = measured(rows)
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


def step(rows: dict[str, dict]) -> str:
    """x: so many times as fast as PyTorch's own operations. Copy: as for attention."""
    header = ["", "cold ms", "x torch", "copy", "warm ms", "x torch", "copy", "max error", "of gradients"]
    lines = []
    for row, info in measured(rows).items():
        cells = [row]
        for time in ("interleaved_median_ms", "warm_median_ms"):
            cells += [number(info.get(time), ".2f"), ratio(rows, "torch", row, time)]
            cells.append(ratio(rows, "copy", row, time, ".0%"))
        lines.append(cells + [number(info.get(key), ".1e") for key in ("max_err", "max_err_grad")])
    return table(header, lines)


def video(rows: dict[str, dict]) -> str:
    model = rows["model"]["interleaved_median_ms"]
    times = {row: info["interleaved_median_ms"] for row, info in rows.items()}
    lines = [[row, f"{ms:.1f}", f"{ms / model:.1%}"] for row, ms in times.items()]
    return table(["", "ms", "of the model's forward"], lines)


def demo(rows: dict[str, dict]) -> str:
    lines = [[row, f"{info['interleaved_median_ms'] / 1e3:.1f}"] for row, info in rows.items()]
    return table(["", "seconds from start to end"], lines)


def standard(rows: dict[str, dict]) -> str:
    """Every cost of a row. x: so many times as fast as that row is our first one. A column that nobody fills is left
    out."""
    rows = measured(rows)
    mine = next((row for row in rows if is_ours(row)), None)
    columns = {
        "cold ms": lambda row, info: number(info["interleaved_median_ms"], ".3f"),
        f"x for {mine}": lambda row, info: ratio(rows, row, mine, "interleaved_median_ms") if mine else ABSENT,
        "warm ms": lambda row, info: number(info.get("warm_median_ms"), ".3f"),
        "graph ms": lambda row, info: number(info.get("graph_median_ms"), ".3f"),
        "floor": lambda row, info: number(info.get("floor_share"), ".0%"),
        "peak MiB": lambda row, info: mib(info.get("peak_bytes")),
        "saved MiB": lambda row, info: mib(info.get("saved_bytes")),
        "max error": lambda row, info: number(None if row in YARDSTICKS else info.get("max_err"), ".1e"),
        "of gradients": lambda row, info: number(info.get("max_err_grad"), ".1e"),
        "bitwise": lambda row, info: {True: "yes", False: "no"}.get(info.get("deterministic"), ABSENT),
    }
    lines = [[row, *(show(row, info) for show in columns.values())] for row, info in rows.items()]
    kept = [0, *(i for i in range(1, len(columns) + 1) if any(line[i] != ABSENT for line in lines))]
    header = ["", *columns]
    return table([header[i] for i in kept], [[line[i] for i in kept] for line in lines])


def mib(value: int | None) -> str:
    return number(None if value is None else value / 2**20, ".1f")


def largest(rows: dict[str, dict]) -> str:
    lines = [[row, number(info.get("largest"), "d"), info.get("reason") or ABSENT] for row, info in rows.items()]
    return table(["", "clips", "what stops it at twice as many"], lines)


TABLES = {"attention": attention, "model": model, "overhead": overhead, "module": standard}
TABLES |= {"step": step, "video": video, "demo": demo, "largest": largest}


def table_of(rows: dict[str, dict]) -> str:
    """The table of a group's kind; on a GPU, and of a run that knows them, with every cost. Failures below it."""
    facts = next(iter(rows.values()))
    kind, gpu = facts["kind"], facts.get("device") == "cuda"
    if kind == "largest":
        return largest(rows)
    parts = []
    if measured(rows):
        plain = gpu and kind != "overhead" or facts["direction"] == "step"
        parts.append((standard if plain else TABLES[kind])(rows))
    reasons: dict[str, list[str]] = {}
    for row, info in rows.items():
        if info["interleaved_median_ms"] is None:
            reasons.setdefault(info.get("reason", "no reason recorded"), []).append(f"`{row}`")
    parts += [f"Not measured: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n\n".join(parts)


def render(result: dict) -> str:
    """Every group as a caption and a table, in markdown."""
    return "\n\n".join(caption(rows, result) + "\n\n" + table_of(rows) for rows in groups(result).values())


def device_summary(result: dict, row: str) -> str:
    """One line a group of attention on a GPU, by CUDA graph where there is one; then the other levels' tables."""
    lines, others, first = [], [], None
    for rows in groups(result).values():
        facts, timed = next(iter(rows.values())), measured(rows)
        if facts["kind"] != "attention":
            others.append(caption(rows, result) + "\n\n" + table_of(rows))
        elif row in timed:
            first = first or timed
            lines.append(_device_line(timed, row, facts))
    if not lines:
        raise ValueError(f"row: no attention row {row!r} in this file")
    header = ["", "cold ms", "graph ms", "floor", "x sdpa", "best peer", "x best peer", "peak MiB", "of sdpa"]
    title = f"**`{row}`.** " + caption(first, result).split("** ", 1)[1].split("; ", 1)[1]
    return "\n\n".join([title, table(header, lines), *others])


def _device_line(timed: dict[str, dict], row: str, facts: dict) -> list[str]:
    # What a CUDA graph could not, or need not, hold is compared by its plain time.
    timed = {name: {**info, "device_ms": goals.device_ms(info)} for name, info in timed.items()}
    info, sdpa, time = timed[row], timed.get("sdpa", {}), "device_ms"
    peers = [name for name in timed if not (is_ours(name) or name in YARDSTICKS or name.endswith("-no-copies"))]
    best = min(peers, key=lambda name: timed[name][time], default="")
    share = info["floor_ms"] / info[time] if info.get("floor_ms") else None
    memory = info["peak_bytes"] / sdpa["peak_bytes"] if info.get("peak_bytes") and sdpa.get("peak_bytes") else None
    return [
        f"{facts['op']}, {facts['shape'].split(',', 1)[0]}, {facts['direction']}, {facts['dtype']}",
        number(info["interleaved_median_ms"], ".3f"),
        number(info.get("graph_median_ms"), ".3f"),
        number(share, ".0%"),
        ratio(timed, "sdpa", row, time),
        best or ABSENT,
        ratio(timed, best, row, time),
        mib(info.get("peak_bytes")),
        number(memory, ".0%"),
    ]


def summary(result: dict, row: str = "cpp") -> str:
    """One line of attention per group, for one row, and the tables of the other kinds that have one worth reading."""
    if any(bench["extra_info"].get("device") == "cuda" for bench in result["benchmarks"]):
        return device_summary(result, row)
    header = first = of_steps = None
    lines, others, steps = [], [], []
    for rows in groups(result).values():
        facts = next(iter(rows.values()))
        if facts["kind"] == "step" and row in measured(rows):
            cells = [line.strip("| ").split(" | ") for line in step(rows).splitlines()]
            (mine,) = (line for line in cells[2:] if line[0] == row)
            of_steps = of_steps or (["", *cells[0][:6]], rows)
            steps.append([f"{facts['op']}, {facts['direction']}, {facts['dtype']}", *mine[1:7]])
        elif facts["kind"] in ("model", "module", "video", "demo"):
            others.append(caption(rows, result) + "\n\n" + table_of(rows))
        elif facts["kind"] == "attention" and row in measured(rows):
            cells = [line.strip("| ").split(" | ") for line in attention(rows).splitlines()]
            (mine,) = (line for line in cells[2:] if line[0] == row)
            header, first = ["", *cells[0][:8]], first or rows
            lines.append([f"{facts['op']}, {facts['direction']}, {facts['dtype']}", *mine[1:9]])
    if not lines:
        raise ValueError(f"row: no attention row {row!r} in this file")
    shown = [("", first, table(header, lines))]
    if of_steps:
        shown.append((", the other steps", of_steps[1], table(of_steps[0], steps)))
    titles = [f"**`{row}`{what}.** {caption(rows, result).split('** ', 1)[1]}\n\n{text}" for what, rows, text in shown]
    return "\n\n".join([*titles, *others])


def ends(found: dict[str, dict]) -> dict[str, dict]:
    """Of many tables those of the fewest and the most frames: enough bars for one picture."""
    facts = {group: next(iter(rows.values())) for group, rows in found.items()}
    lengths = {info.get("frames") for info in facts.values()} - {None}
    kept = {min(lengths), max(lengths)} if lengths else {None}
    plain = {
        group: rows
        for group, rows in found.items()
        if facts[group].get("frames") in kept and (len(found) <= 8 or facts[group]["direction"] != "forward+backward")
    }
    return dict(list(plain.items())[:8])


def draw(result: dict, folder: Path, stem: str) -> list[Path]:
    """Writes STEM-LEVEL.png with bars, and over the number of frames STEM-time.png and STEM-memory.png."""
    from timesformer.benchmarking import plots

    levels: dict[str, dict] = {}
    for group, rows in groups(result).items():
        facts = next(iter(rows.values()))
        if facts["kind"] in ("attention", "module", "model") and measured(rows):
            levels.setdefault(facts["op"].replace(" ", "-"), {})[group] = rows
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    for level, found in levels.items():
        drawn.append(folder / f"{stem}-{level}.png")
        plots.bars(ends(found), drawn[-1])
    attention = {
        group: rows for level, found in levels.items() if "attention" in level for group, rows in found.items()
    }
    for quantity in ("time", "memory"):
        path = folder / f"{stem}-{quantity}.png"
        try:
            plots.over_frames(attention, path, quantity)
            drawn.append(path)
        except ValueError:  # a run of one length, or without costs
            continue
    if not drawn:
        raise ValueError("file: holds nothing to draw")
    return drawn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("file", type=Path, help="JSON written by --benchmark-json")
    parser.add_argument("--summary", action="store_true", help="the README's tables: one line per group")
    parser.add_argument(
        "--goals", action="store_true", help="the goals set for an H200: reached, or missed by how much"
    )
    parser.add_argument("--row", help="of --summary and --goals (default: cpp; triton in a file of a GPU)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures named after the file into this folder")
    arguments = parser.parse_args(argv)
    try:
        result = load(arguments.file)
        gpu = any(bench["extra_info"].get("device") == "cuda" for bench in result["benchmarks"])
        row = arguments.row or ("triton" if gpu else "cpp")
        if arguments.plots:
            for path in draw(result, arguments.plots, arguments.file.stem):
                print(path)
        elif arguments.goals:
            print(goals.render(groups(result), row))
        else:
            print(summary(result, row) if arguments.summary else render(result))
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
