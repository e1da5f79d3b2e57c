# SPDX-License-Identifier: Apache-2.0
"""What the files of a stage say: one line for the table, and data for the JSON."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

OWN = ("triton", "cuda", "ours")  # rows of a benchmark that must not fail
SHOWN = 3  # failures named in a line; the data has all


class Failed(Exception):
    """A stage that ran, and found something wrong. data: as of a pass."""

    def __init__(self, text: str, data: dict):
        super().__init__(text)
        self.data = data


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def plain(context) -> tuple[str, dict]:
    """Of the scripts beside this file: {"ok", "finding", ...}."""
    data = read(context.folder / "result.json")
    if not data["ok"]:
        raise Failed(data["finding"], data)
    return data["finding"], data


def env(context) -> tuple[str, dict]:
    return plain(context)


def ceilings(context) -> tuple[str, dict]:
    return plain(context)


# Tests


def reports(context) -> tuple[list[dict], int]:
    """([{"id", "outcome", "seconds", "reason"}] of every test that ended, the last of each; how many never ended)."""
    lines = (context.folder / "reports.jsonl").read_text(encoding="utf-8").splitlines()
    found, selected, ended = {}, 0, set()
    for report in map(json.loads, lines):
        if "selected" in report:  # the last run with this file
            selected, ended = report["selected"], set()
        else:
            found[report["id"]] = report
            ended |= {report["id"]} if "::" in report["id"] else set()
    return list(found.values()), selected - len(ended)


def tests(context) -> tuple[str, dict]:
    found, lost = reports(context)
    count = Counter(report["outcome"] for report in found)
    bad = [report for report in found if report["outcome"] in ("failed", "error")]
    reasons = Counter(report["reason"] for report in found if report["outcome"] == "skipped")
    data = {"count": dict(count), "never ended": lost, "failed": bad, "skipped": dict(reasons.most_common())}
    data["slowest"] = sorted(((r["seconds"], r["id"]) for r in found), reverse=True)[:20]
    text = ", ".join(f"{n} {word}" for word, n in count.most_common()) or "no test ran"
    if bad:
        raise Failed(f"{text}: {some([report['id'].split('/')[-1] for report in bad])}", data)
    if lost or not count["passed"]:
        raise Failed(f"{text}, {lost} never ended" if lost else text, data)
    return text, data


def some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


SUBJECTS = {
    "opcheck": ("opcheck",),
    "compile": ("compile", "without_a_library"),
    "export": ("export",),
    "func": ("TestFunc", "test_func", "vmap"),
    "autocast": ("autocast",),
    "checkpoint": ("checkpoint",),
    "refusals": ("refuse",),
    "fake, meta": ("fake", "meta"),
}


def registration(context) -> tuple[str, dict]:
    """The tests of the registered ops as a table: what torch does to an op x backend."""
    matrix: dict[str, dict[str, Counter]] = {}
    for report in reports(context)[0]:
        test, _, parameters = report["id"].partition("[")
        name = next((s for s, parts in SUBJECTS.items() if any(part in test for part in parts)), "other")
        backend = next((b for b in ("triton", "cuda", "cpp", "reference") if b in parameters), "any")
        matrix.setdefault(name, {}).setdefault(backend, Counter())[report["outcome"]] += 1
    try:
        text, data = tests(context)
    except Failed as error:
        error.data["matrix"] = matrix
        raise
    return f"{text}: {', '.join(matrix)}", {**data, "matrix": matrix}


# Benchmarks


def rows(context) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """{group: {row: extra_info}} of all files of the stage, and what these call failed or left out."""
    groups: dict[str, dict[str, dict]] = {}
    said = []
    for path in sorted(context.folder.glob("*.json")):
        result = read(path)
        info = result["machine_info"]
        said += [f"failed: {x}" for x in info.get("failed", [])] + [f"left out: {x}" for x in info.get("left_out", [])]
        for bench in result["benchmarks"]:
            groups.setdefault(bench["group"], {})[bench["extra_info"]["row"]] = bench["extra_info"]
    return groups, said


def bench(context) -> tuple[str, dict]:
    """Fails where a row of ours that should run does not, or nothing was measured."""
    groups, said = rows(context)
    measured = [info for group in groups.values() for info in group.values() if info.get("interleaved_median_ms")]
    unable = {f"{g}: {r}": i["reason"] for g, found in groups.items() for r, i in found.items() if i.get("reason")}
    device = next((info.get("device") for found in groups.values() for info in found.values()), None)
    broken = {key: why for key, why in unable.items() if ours(key.rpartition(": ")[2]) and device == "cuda"}
    lines = {name: line for name, found in groups.items() if (line := compared(found))}
    data = {"groups": lines, "unable": unable, "said": said}
    text = f"{len(measured)} rows in {len(groups)} tables"
    if unable:
        text += f", {len(unable)} cannot run"
    if said:
        text += f", {len(said)} tables left out or failed"
    broken |= {text: "" for text in said if text.startswith("failed")}
    if broken or not measured:
        raise Failed("; ".join(filter(None, [text, some([*broken])])), data)
    ratios = [line["x sdpa"] for line in lines.values() if line.get("x sdpa")]
    if ratios and not context.cpu:  # tiny shapes measure nothing
        text += f"; x sdpa {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
    return text, data


def chosen(context) -> tuple[str, dict]:
    """Of the benchmarks from which the rules of `auto` are made: as `bench`, and what was decided."""
    text, data = bench(context)
    path = context.folder.parent / "choice.json"
    rules = read(path)["rules"] if path.exists() else []  # the program that writes it has an exit status of its own
    data["choice"] = [rule for rule in rules if "measured" in rule["reason"]]
    backends = Counter(rule["backend"] for rule in data["choice"])
    return text + "".join(f"; {name} chosen {n} times" for name, n in backends.most_common()), data


def ours(row: str) -> bool:
    return row.split("-")[0] in OWN and row not in ("ours-cpp", "ours-reference")


def compared(found: dict[str, dict]) -> dict | None:
    """Of a table our fastest row: milliseconds, share of the floor, and how many times as long its peers take."""
    times = {row: info.get("interleaved_median_ms") for row, info in found.items()}
    own = {row: time for row, time in times.items() if time and ours(row)}
    if not own:
        return None
    best = min(own, key=own.get)
    line = {
        "row": best,
        "ms": own[best],
        "floor share": found[best].get("floor_share"),
        "noise": found[best].get("noise"),
    }
    peers = ("sdpa", "eager", "huggingface", "huggingface-sdpa", "products", "copy")
    return line | {f"x {row}": times[row] / own[best] for row in peers if times.get(row)}


def largest(context) -> tuple[str, dict]:
    groups, _ = rows(context)
    found = {f"{group}: {row}": info for group, rows in groups.items() for row, info in rows.items()}
    data = {key: {"largest": info.get("largest"), "reason": info.get("reason")} for key, info in found.items()}
    best = ", ".join(f"{key.rpartition(': ')[2]} {x['largest']}" for key, x in data.items() if x["largest"])
    if not best:
        raise Failed("no row ran", data)
    return best, data


def resources(context) -> tuple[str, dict]:
    found = read(context.folder / "result.json")["reports"]
    bad = [report for report in found if report["problems"]]
    most = {key: max((r.get(key, 0) for r in found), default=0) for key in ("registers", "spill", "shared")}
    text = f"{len(found)} kernels, at most {most['registers']} registers, {most['shared'] / 1024:.0f} KiB shared"
    data = {"kernels": len(found), **most, "problems": bad}
    if bad or not found:
        names = [f"{r['kernel']} sm_{r['arch']} {r['dtype']} M={r['members']}: {r['problems'][0]}" for r in bad]
        raise Failed(f"{text}; {len(bad)} with problems: {some(names)}", data)
    return text, data
