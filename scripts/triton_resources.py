#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs that are not there, read what came out, and fail where it is not good enough.

    python scripts/triton_resources.py                            every row of configs.json, some minutes
    python scripts/triton_resources.py --arch 90 --kernel resident --json out.json

The launches are the real ones: the host code runs on small CPU tensors, and what it would start is compiled instead,
with the types and alignments of those very arguments. From the machine code: registers, spills, shared memory, width of
the loads from global memory, matrix instructions, and for kernels without a loop the instructions per row and head.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timesformer_kernels import grid
from timesformer_kernels.backends.triton import attention, regimes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHES = (80, 90, 100, 120)
# Bytes of shared memory a block may have. The table has one row for all of 8.x, so 8.6 and 8.9 (99 KiB) set the limit.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MATRIX = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTCHMMA"), 120: ("HMMA",)}
# Warp instructions per row and head that leave the memory, not the issue slots, in charge (time attention, D = 64).
BUDGET = {"resident_forward": 110, "resident_backward": 193}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# (scheme, members, class mode) that TimeSformer meets. Time: 8 to 96 frames; space: 112 and 224 px, 16 x 16 patches,
# 448 px; one that is long and counts the class row once.
CASES = [("time", m, "exclude") for m in (8, 16, 32, 64, 96)]
CASES += [("space", m, "per_group") for m in (50, 197, 257, 785)] + [("space", 1000, "global")]
OTHERS = [("time", m, "exclude") for m in (10, 160)]  # the rows of the table that these leave out
TABLE = regimes.config


def record(view: grid.View, dtype: torch.dtype, heads: int, head_dim: int, capability, precision: str) -> list[tuple]:
    """(kernel, arguments, options) of each launch of a forward and a backward over `view`, on CPU tensors."""
    calls = []
    attention.Step.run = lambda step, like, tensors, *floats: calls.append(
        (step.kernel, (*tensors, *step.numbers, *floats, step.plan), step.options)
    )
    attention.capability = lambda device: capability
    attention.float32_precision = lambda: precision
    attention._forward_plan.cache_clear()
    attention._backward_plan.cache_clear()
    tokens = view.first + view.num_groups * view.length
    q, k, v = torch.zeros(1, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    size = regimes.stats_size(q.shape, dtype, view)
    stats = torch.zeros(size) if size else None
    out = attention.forward(q, k, v, view, 1.0, None, stats)
    attention.backward(out, q, k, v, view, 1.0, None, None, (out, stats))
    return calls


def source(kernel, args) -> ASTSource:
    """What the run-time compiler would be given for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if value is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            assert parameter.do_not_specialize, (
                f"{parameter.name} of {kernel.__name__} would be specialised on its value"
            )
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


@functools.cache  # of neighbouring shapes many kernels are the same, and disassembling takes as long as compiling
def read_cubin(cubin: bytes) -> dict:
    """What `read_listing` finds in a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        disassemble = [TOOLS / "nvdisasm", "--print-code", "--no-dataflow", file.name]
        listing = subprocess.check_output(disassemble, text=True, stderr=subprocess.DEVNULL)
    return read_listing(usage, listing)


def read_listing(usage: str, listing: str) -> dict:
    """Registers, spills and instruction counts from cuobjdump and nvdisasm. Only the .text section is code."""
    text = re.search(r"^\s*\.section\s+\.text\..*?(?=^\s*\.section\s|\Z)", listing, re.M | re.S)[0]
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*)", text, re.M)
    names = Counter(name.split(".")[0] for name in code)
    stack = sum(int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("STACK", "LOCAL"))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill": stack + names["LDL"] + names["STL"],
        "instructions": len(code) - names["NOP"],
        "loads": dict(Counter(name for name in code if name.startswith(("LDG", "STG")))),
        "matrix": {name: names[name] for name in ("HMMA", "HGMMA", "UTCHMMA") if names[name]},
        "fma": names["FFMA"],
    }


def build(job: dict) -> list[dict]:
    """Compile the kernels of a job, a report of each. job["configs"] replaces the table for the kernels it names."""
    torch.set_num_threads(1)
    configs, dtype = job.get("configs", {}), getattr(torch, job["dtype"])
    regimes.config = lambda name, *rest: regimes.Config(*configs[name]) if name in configs else TABLE(name, *rest)
    length = job["members"] - (regimes.CLS[job["cls"]] > 0)
    frames = length if job["scheme"] == "time" else 2
    view = grid.view_of_frames(job["scheme"], length * 2 + (job["cls"] != "none"), frames, job["cls"], "space_major")
    calls = record(view, dtype, 2, job["head_dim"], divmod(job["arch"], 10), job["precision"])
    return [compiled_report(job, *call) for call in calls if call[0].__name__.startswith(tuple(job["kernels"]) or "")]


def compiled_report(job: dict, kernel, args, options: dict) -> dict:
    """Compile one launch and say what came of it."""
    start, plan = time.perf_counter(), args[-1]
    out = {k: job[k] for k in ("arch", "dtype", "precision", "head_dim", "members", "cls")} | {
        "kernel": kernel.__name__
    }
    try:
        compiled = triton.compile(source(kernel, args), target=GPUTarget("cuda", job["arch"], 32), options=options)
    except Exception as error:  # the compiler fails with anything
        return {**out, "problems": [f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"]}
    out |= {"seconds": round(time.perf_counter() - start, 2), "shared": compiled.metadata.shared, **options}
    out |= read_cubin(compiled.asm["cubin"])
    out["tile"] = [plan.BLOCK_M, *(plan.BLOCKS or (plan.BLOCK_N,)), plan.PACK]
    if plan.PACK > 1 or (plan.M and plan.ROWS - plan.SKIP <= plan.BLOCK_M):
        out["per_row"] = round(out["instructions"] * options["num_warps"] / (plan.PACK * plan.M), 1)
    out["problems"] = judge(out)
    return out


def judge(report: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    found, arch, wide = [], report["arch"], report["dtype"] == "float32"
    if report["spill"]:
        found.append(f"spills ({report['spill']})")
    if report["shared"] > SHARED[arch]:
        found.append(f"{report['shared']} bytes of shared memory, the limit is {SHARED[arch]}")
    if report["kernel"].startswith("class"):
        return found
    if narrow := {n: c for n, c in report["loads"].items() if n.startswith("LDG") and re.search(r"\.[US](8|16)\b", n)}:
        found.append(f"narrow loads {narrow}")
    if not any(name.startswith("LDG") and "128" in name for name in report["loads"]):
        found.append("no 16-byte load")
    if not wide or report["precision"] == "tf32":
        if not any(report["matrix"].get(name) for name in MATRIX[arch]):
            found.append("no matrix instruction")
    elif report["matrix"]:
        found.append(f"matrix instructions in true float32: {report['matrix']}")
    budget = BUDGET.get(report["kernel"], math.inf)
    if report["head_dim"] == 64 and report["cls"] == "exclude" and not wide and report.get("per_row", 0) > budget:
        found.append(f"{report['per_row']} instructions per row and head, the budget is {budget}")
    return found


def jobs(arches, dtypes, head_dims, kernels) -> list[dict]:
    """One job for each case; dtypes: (dtype, precision)."""
    names = ("arch", "dtype", "precision", "head_dim", "scheme", "members", "cls", "kernels")
    product = itertools.product(arches, dtypes, head_dims, CASES + OTHERS)
    return [dict(zip(names, (arch, *dtype, D, *case, kernels), strict=True)) for arch, dtype, D, case in product]


def line(report: dict) -> str:
    words = [f"sm_{report['arch']:<4}{report['kernel']:<22}", f"{report['dtype']:<9}{report['precision']:<5}"]
    words.append(f"D={report['head_dim']:<4}M={report['members']:<5}")
    if "registers" in report:
        kinds = {
            re.sub(r"\.(E|CONSTANT|EF|EL|STRONG|GPU|BYPASS|LTC128B)\b", "", n): c for n, c in report["loads"].items()
        }
        words.append(f"tile {'x'.join(map(str, report['tile'])):<15}")
        words.append(
            f"warps {report['num_warps']} stages {report.get('num_stages', '-')} regs {report['registers']:>3} "
            f"spill {report['spill']}"
        )
        words.append(f"smem {report['shared'] / 1024:>5.0f}K instr {report['instructions']:>5}")
        words.append(f"per row {report.get('per_row', '-'):>6} {report['matrix'] or ''} {kinds}")
    return " ".join([*words, "; ".join(report["problems"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES, choices=ARCHES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32", "tf32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kernel", nargs="*", default=[], help="beginnings of kernel names")
    parser.add_argument("--members", type=int, nargs="*", help="only these lengths, class row counted")
    parser.add_argument("--json", type=Path, help="write all reports to this file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    dtypes = [("float32", "tf32") if name == "tf32" else (name, "ieee") for name in options.dtype]
    work = jobs(options.arch, dtypes, options.head_dim, options.kernel)
    if options.members:
        work = [job for job in work if job["members"] in options.members]
    print(f"triton {triton.__version__}, {len(work)} shapes", flush=True)
    reports = []
    with ProcessPoolExecutor(options.workers) as pool:
        for batch in pool.map(build, work, chunksize=len(CASES + OTHERS)):  # one process where only the length differs
            for report in batch:
                print(line(report), flush=True)
                reports.append(report)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "reports": reports}, indent=1))
    bad = [report for report in reports if report["problems"]]
    for report in bad:
        print(line(report))
    print(f"{len(reports)} kernels, {len(bad)} with problems")
    return 1 if bad or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
