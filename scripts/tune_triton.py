#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Choose the tile sizes, warps and stages in configs.json, row by row.

    python scripts/tune_triton.py --out new.json                   on a GPU: the fastest for that GPU's architecture
    python scripts/tune_triton.py --static --arch sm_9x sm_12x     without: the first that compiles well

A row serves the sequences longer than those of the row before it, up to its own limit; the limits stay. Its present
configuration is tried first, then others. One that spills, wants more shared memory than there is or fails the gate
otherwise (triton_resources.py) is out. On a GPU the rest is timed through the backend, on the shapes TimeSformer meets
in that row, L2 cache cold; a row changes only where another is faster by more than MARGIN.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
import triton_resources
from triton_resources import CASES, TABLE

from timesformer_kernels import grid
from timesformer_kernels.backends.triton import attention, regimes

ARCHES = {"sm_8x": 80, "sm_9x": 90, "sm_10x": 100, "sm_12x": 120}
KINDS = {"bits16": ("bfloat16", "ieee"), "ieee": ("float32", "ieee"), "tf32": ("float32", "tf32")}
MARGIN = 0.01  # less is noise, and a table that stays is one less thing to wonder about
FRAMES, PLACES, HEADS = 8, 196, 12  # TimeSformer-B at 224 px, of which the timed calls have 8 clips, or as many tokens
TOKENS = 8 * FRAMES * PLACES
REPEATS, FLUSH_BYTES = 30, 256 << 20


def cases(kernel: str, kind: str, head_dim: int, low: int, high: int) -> list[tuple[str, int, str]]:
    """What TimeSformer meets in a row, lengths above low up to high; time attention of the longest if nothing."""
    itemsize, direction = (
        getattr(torch, KINDS[kind][0]).itemsize,
        "forward" if kernel.endswith("forward") else "backward",
    )
    whole = kernel.startswith("resident")
    met = [case for case in CASES if whole == regimes.resident(direction, case[1], itemsize, head_dim)]
    return [case for case in met if low < case[1] <= high] or [("time", high, "exclude")]


def candidates(kernel: str, longest: int, present: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(block_m, block_n, num_warps, num_stages), the best bets first: what the row has, large tiles, few warps."""
    if kernel.startswith("streaming"):
        tiles = [(m, n) for m in (128, 64, 32) for n in (128, 64, 32)]
        found = [(m, n, w, s) for (m, n), w, s in itertools.product(tiles, (4, 8), (3, 2, 1))]
    elif longest <= regimes.PACKED:
        rows = max(16, 1 << (longest - 1).bit_length())
        tiles = sorted({rows, 2 * rows, 64}, key=lambda m: (-(m // longest * longest / m), m))  # fullest tiles first
        found = [(m, m, w, 1) for m, w in itertools.product(tiles, (1, 2, 4))]
    else:
        held = 1 << (longest - 1).bit_length()
        tiles = [(m, n) for m in (128, 64, 32, 16) if m <= held for n in (128, 64, 32) if n <= held]
        found = [(m, n, w, 1) for (m, n), w in itertools.product(tiles, (4, 8))]
    return list(dict.fromkeys([tuple(present), *found]))


def problems(work: tuple) -> list[str]:
    """Why a candidate is out, on any case of its row."""
    arch, kernel, kind, head_dim, met, config = work
    dtype, precision = KINDS[kind]
    found = []
    for scheme, members, cls in met:
        job = dict(arch=ARCHES[arch], dtype=dtype, precision=precision, head_dim=head_dim, scheme=scheme, cls=cls)
        job |= dict(members=members, kernels=[kernel], configs={kernel: config})
        reports = [report for report in triton_resources.build(job) if report["kernel"] == kernel]
        if not reports:
            found.append(f"{kernel} does not serve {scheme} attention over {members} members")
        found += [problem for report in reports for problem in report["problems"]]
        if found:  # one is enough, and each takes seconds
            break
    return found


def milliseconds(kernel: str, kind: str, head_dim: int, met: list, config: tuple) -> float:
    """Median time of the call that holds the kernel, L2 cache cold; over several cases their geometric mean."""
    dtype, precision = KINDS[kind]
    regimes.config = lambda name, *rest: regimes.Config(*config) if name == kernel else TABLE(name, *rest)
    attention.float32_precision = lambda: precision
    attention._forward_plan.cache_clear()
    attention._backward_plan.cache_clear()
    flush, medians = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda"), []
    for scheme, members, cls in met:
        length, first = members - (regimes.CLS[cls] > 0), int(cls != "none")
        frames, places = (length, PLACES) if scheme == "time" else (FRAMES, length)
        tokens, batch = first + frames * places, max(1, TOKENS // (frames * places))
        view = grid.view_of_frames(scheme, tokens, frames, cls, "space_major")
        qkv = torch.randn(batch, tokens, 3, HEADS, head_dim, device="cuda", dtype=getattr(torch, dtype))
        size = regimes.stats_size(qkv[:, :, 0].shape, qkv.dtype, view)
        stats = torch.empty(size, device="cuda") if size else None
        forward = partial(attention.forward, *qkv.unbind(2), view, head_dim**-0.5, None, stats)
        call, out = forward, forward()
        if not kernel.endswith("forward"):
            grads = torch.empty_like(qkv).unbind(2)
            inputs = out, *qkv.unbind(2), view, head_dim**-0.5, None
            call = partial(attention.backward, *inputs, grads, (out, stats) if size else None)
        events = []
        for _ in range(REPEATS):
            flush.zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            call()
            events[-1][1].record()
        torch.cuda.synchronize()
        medians.append(statistics.median(start.elapsed_time(stop) for start, stop in events[1:]))  # the first compiles
    return statistics.geometric_mean(medians)


def choose(name: str, passed: list[tuple], times: list[float] | None) -> tuple:
    """The candidate for a row, and a line that says why."""
    if times is None:
        print(f"{name}: {passed[0]}, the first that passes", flush=True)
        return passed[0]
    best = min(range(len(passed)), key=times.__getitem__)
    chosen = best if times[best] < times[0] * (1 - MARGIN) else 0
    print(
        f"{name}: {passed[chosen]} {times[chosen]:.4f} ms; {passed[0]} {times[0]:.4f} ms, {len(passed)} timed",
        flush=True,
    )
    return passed[chosen]


def rows(table: dict, options) -> list[tuple]:
    """(arch, kernel, kind, head_dim, index of the row) of what is to be tuned."""
    out = []
    for arch, kernel in itertools.product(options.arch, options.kernel or table[options.arch[0]]):
        for kind, head_dim in itertools.product(options.kind, options.head_dim):
            for index, row in enumerate(table[arch][kernel][kind][str(head_dim)]):
                if not options.limit or row[0] in options.limit:
                    out.append((arch, kernel, kind, head_dim, index))
    return out


def compact(table: dict) -> str:
    """JSON with one line for each row."""
    return re.sub(r"\[\s+(-?\d+),\s+(.*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", f"{m[1]}, {m[2]}") + "]",
                  json.dumps(table, indent=1), flags=re.S)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--static", action="store_true", help="compile only: no GPU is needed and nothing is timed")
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="with --static; all by default")
    parser.add_argument("--kernel", nargs="+", help="only these")
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], choices=[64, 128])
    parser.add_argument("--limit", type=int, nargs="+", help="only the rows with these limits of length")
    parser.add_argument("--out", type=Path, default=regimes.TABLE, help="default: the table itself")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if not options.static:
        if not torch.cuda.is_available():
            parser.error("no GPU; --static chooses without one")
        if options.arch:
            parser.error("--arch needs --static: only the GPU at hand can be timed")
    options.arch = options.arch or list(ARCHES)
    return options


def _choices(options) -> list[str]:
    """The options that decide what is chosen, without where it is written."""
    given = {"arch": options.arch if options.static else None, "kernel": options.kernel, "kind": options.kind}
    given |= {"head-dim": options.head_dim, "limit": options.limit}
    words = [[f"--{name}", *map(str, values)] for name, values in given.items() if values]
    return ["--static"] * options.static + [word for group in words for word in group]


def main() -> int:
    options, document = arguments(), json.loads(regimes.TABLE.read_text())
    table, device = document["configs"], None
    if unknown := set(options.kernel or ()) - set(table["sm_8x"]):
        raise SystemExit(f"--kernel: got {', '.join(sorted(unknown))}, expected some of {', '.join(table['sm_8x'])}")
    if not options.static:
        device = torch.cuda.get_device_name(0)
        options.arch = [regimes.architecture(torch.cuda.get_device_capability(0))]
    todo, passed = rows(table, options), []
    if not todo:
        raise SystemExit("the table has no such row")
    with ProcessPoolExecutor(options.workers) as pool:
        tried = []
        for arch, kernel, kind, head_dim, index in todo:
            row = table[arch][kernel][kind][str(head_dim)]
            met = cases(kernel, kind, head_dim, row[index - 1][0] if index else 0, row[index][0])
            configs = candidates(kernel, max(m for _, m, _ in met), row[index][1:])
            work = [(arch, kernel, kind, head_dim, met, config) for config in configs]
            tried.append((met, [(config, pool.submit(problems, x)) for config, x in zip(configs, work, strict=True)]))
        for target, (met, tries) in zip(todo, tried, strict=True):
            good = []
            for config, result in tries:
                if options.static and good:
                    result.cancel()
                elif not (found := result.result()):
                    good.append(config)
                else:
                    print(f"{' '.join(map(str, target[:4]))} {config}: {'; '.join(found)}", flush=True)
            if not good:
                raise SystemExit(f"no configuration passes for {' '.join(map(str, target[:4]))}")
            passed.append((good, met))
    for (arch, kernel, kind, head_dim, index), (good, met) in zip(todo, passed, strict=True):
        row = table[arch][kernel][kind][str(head_dim)][index]
        times = None if options.static else [milliseconds(kernel, kind, head_dim, met, config) for config in good]
        row[1:] = choose(f"{arch} {kernel} {kind} D={head_dim} M<={row[0]}", good, times)
    record = {"triton": triton.__version__, "device": device, "date": date.today().isoformat()}
    record["command"] = shlex.join(["python", "scripts/tune_triton.py", *_choices(options)])
    document["made"] = document.get("made", {}) | {arch: record for arch in options.arch}
    options.out.write_text(compact(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
