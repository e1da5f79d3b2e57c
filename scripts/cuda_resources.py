#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for GPUs that are not there, read what came out, and fail where it is not good enough.

    python scripts/cuda_resources.py                        sm_80, sm_90a, sm_100 and sm_120, a minute
    python scripts/cuda_resources.py --arch 90a --kernel short --json out.json

Needs nvcc (on PATH or in CUDA_HOME); without it there is nothing to do: exit code 2. Registers, spills and static
shared memory are the assembler's own account. Instructions come from a disassembly: nvdisasm on PATH, of the toolkit,
or the one in Triton's wheel; without any they are not counted, and a line says so. Exit code 1: a kernel has a problem.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "csrc/cuda/launch.cu"
ARCHES = ("80", "90a", "100", "120")
FLAGS = ["-O3", "-std=c++17", "-Xptxas", "-v", "-cubin"]
STATIC_SHARED = 48 << 10  # bytes of a block, anywhere; what is asked for at run time is checked at run time
# Warp instructions per row and head that leave the memory, not the issue slots, in charge (time attention, D = 64).
# Half of it for a kernel that is made for a number of members.
BUDGET = {"short_forward": 110, "short_backward": 193}
TENSORS = {"short_forward": (3, 1), "short_backward": (4, 3)}  # read and written
# What the kernels of compute capability 9.0 live on; their threads, and by head_dim the blocks that must fit a
# multiprocessor's 65536 registers.
HOPPER_PARTS = ("HGMMA", "UTMALDG")
HOPPER = {
    "hopper_forward": (256, {64: 2, 128: 1}),
    "hopper_backward_queries": (128, {64: 3}),
    "hopper_backward_keys": (128, {64: 3}),
}
SERIALIZED = re.compile(r"\(C75\d\d\).*'(\S+)'")  # the assembler's note on a kernel whose wgmma wait for one another
TYPES = {"f": "float32", "d": "float64", "i": "int", "__nv_bfloat16": "bfloat16", "__half": "float16"}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def find_nvdisasm(nvcc: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    places = [Path(nvcc).resolve().parent]
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = [shutil.which("nvdisasm"), *(shutil.which("nvdisasm", path=str(place)) for place in places)]
    return next((path for path in found if path), None)


def plain_name(symbol: str) -> tuple[str, tuple]:
    """(name without "_kernel", template arguments) of a mangled kernel; arguments are dtypes, integers and bools."""
    at, name = (3 if symbol.startswith("_ZN") else 2), symbol
    while match := re.compile(r"(\d+)").match(symbol, at):
        at = match.end() + int(match[1])
        name = symbol[match.end() : at]
    arguments = []
    if symbol[at : at + 1] == "I":
        at += 1
        while at < len(symbol) and symbol[at] != "E":
            if match := re.compile(r"L([a-z])(n?)(\d+)E").match(symbol, at):
                value = int(match[3]) * (-1 if match[2] else 1)
                arguments.append(bool(value) if match[1] == "b" else value)
                at = match.end()
            elif match := re.compile(r"(\d+)").match(symbol, at):
                at = match.end() + int(match[1])
                arguments.append(TYPES.get(symbol[match.end() : at], symbol[match.end() : at]))
            else:
                arguments.append(TYPES.get(symbol[at], symbol[at]))
                at += 1
    return name.removesuffix("_kernel"), tuple(arguments)


def read_assembler(text: str) -> dict[str, dict]:
    """{symbol: registers, bytes of spills and stack, of static shared memory} from what `-Xptxas -v` prints."""
    found, serialized = {}, set(SERIALIZED.findall(text))
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", text):
        if not (head := re.match(r"ptxas info\s+: Compiling entry function '(\S+)'", part)):
            continue
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", part)
        found[head[1]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spill": sum(map(int, spills.groups())),
            "shared": int(shared[1]) if shared else 0,
            "serialized": head[1] in serialized,
        }
    return found


def read_listing(text: str) -> dict[str, dict]:
    """{symbol: instruction counts} of nvdisasm's listing. Only .text sections are code."""
    found = {}
    for part in re.split(r"(?=^\s*\.section\s)", text, flags=re.M):
        if not (head := re.match(r"\s*\.section\s+\.text\.([\w$.]+)", part)):
            continue
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*)", part, re.M)
        names = Counter(name.split(".")[0] for name in code)
        found[head[1]] = {
            "instructions": len(code) - names["NOP"],
            "local": names["LDL"] + names["STL"],
            "memory": dict(Counter(short_name(name) for name in code if re.match(r"(LDG|STG|LDGSTS)\b", name))),
            "matrix": sum(names[name] for name in ("HMMA", "HGMMA", "UTCHMMA")),
            "transposes": names["MOVM"],
            "hopper": {name: names[name] for name in ("HGMMA", "UTMALDG", "MUFU", "FFMA", "FMNMX", "FADD", "FMUL")},
        }
    return found


def short_name(instruction: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128: what is loaded, not how."""
    kind, *rest = instruction.split(".")
    return ".".join([kind, *(word for word in rest if re.fullmatch(r"[US]?(8|16|32|64|128|256)", word))])


def rows(members: int) -> int:
    """Rows in the sixteen of a warp of the short kernels; 0: any number of members, of which 9 waste the most."""
    return (16 // members) * members if members else 9


def judge(report: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    found, name = [], report["kernel"]
    if report["spill"] or report.get("local"):
        found.append(f"spills ({report['spill'] + report.get('local', 0)})")
    if report["shared"] > STATIC_SHARED:
        found.append(f"{report['shared']} bytes of shared memory, the limit is {STATIC_SHARED}")
    if report.get("serialized"):
        found.append("wgmma instructions wait for one another")
    if name in HOPPER and report["arch"] == "90a":
        threads, blocks = HOPPER[name][0], HOPPER[name][1][report["arguments"][1]]
        if (report["registers"] + 7) // 8 * 8 * threads * blocks > 65536:  # given to a warp by eights
            found.append(f"{report['registers']} registers, too many for {blocks} blocks")
        found += [f"no {part}" for part in HOPPER_PARTS if "hopper" in report and not report["hopper"][part]]
    if name not in TENSORS:
        return found
    if report["shared"]:
        found.append(f"{report['shared']} bytes of shared memory, it needs none")
    if "memory" not in report:
        return found
    _, head_dim, members = report["arguments"]
    for kind, tensors in zip(("LDG", "STG"), TENSORS[name], strict=True):
        wide, wanted = report["memory"].get(f"{kind}.128", 0), tensors * 2 * head_dim // 32
        if wide < wanted:
            found.append(f"{wide} {kind}.128, not {wanted}")
    if narrow := {n: c for n, c in report["memory"].items() if re.search(r"\.[US](8|16)$", n)}:
        found.append(f"narrow accesses {narrow}")
    if not report["matrix"]:
        found.append("no matrix instruction")
    budget = BUDGET[name] / 2 if members else BUDGET[name]
    if head_dim == 64 and report["per_row"] > budget:
        found.append(f"{report['per_row']} instructions per row and head, the budget is {budget:g}")
    return found


def build(nvcc: str, nvdisasm: str | None, arch: str, source: Path = SOURCE) -> tuple[list[dict], str]:
    """(a report of every kernel, the compiler's warnings) for one architecture. Raises RuntimeError with its errors."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(said.strip())
        kernels, listing = read_assembler(said), {}
        if nvdisasm:
            text = subprocess.run([nvdisasm, "-c", "-ndf", cubin], capture_output=True, text=True, check=True).stdout
            listing = read_listing(text)
    reports = []
    for symbol, usage in kernels.items():
        name, arguments = plain_name(symbol)
        report = {"arch": arch, "kernel": name, "arguments": list(arguments), **usage, **listing.get(symbol, {})}
        if name in TENSORS and "instructions" in report:
            report["per_row"] = round(report["instructions"] / rows(arguments[2]), 1)
        reports.append({**report, "problems": judge(report)})
    reports.sort(key=lambda r: (r["kernel"], [str(a).rjust(4) for a in r["arguments"]]))
    return reports, "\n".join(line for line in said.splitlines() if "warning" in line.lower())


def builds(nvcc: str, nvdisasm: str | None, arches):
    """(reports, warnings, seconds) of each architecture, one to a core; (None, errors, seconds) where it fails."""

    def timed(arch):
        start = time.perf_counter()
        try:
            found, said = build(nvcc, nvdisasm, arch)
        except RuntimeError as error:
            found, said = None, str(error)
        return found, said, time.perf_counter() - start

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(timed, arches)


def line(report: dict) -> str:
    words = [f"sm_{report['arch']:<4} {report['kernel']:<24}{', '.join(map(str, report['arguments'])):<20}"]
    words.append(f"regs {report['registers']:>3} spill {report['spill']} smem {report['shared']:>5}")
    if "instructions" in report:
        words.append(
            f"instr {report['instructions']:>5} per row {report.get('per_row', '-'):>6} mma {report['matrix']:>3}"
        )
        words.append(" ".join(f"{name}:{count}" for name, count in sorted(report["memory"].items())))
        if report["kernel"] in HOPPER:
            words.append(" ".join(f"{name}:{count}" for name, count in report["hopper"].items()))
    return " ".join([*words, "; ".join(report["problems"])]).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHES, help="of 80, 90a, 100, 120 or others that nvcc knows")
    parser.add_argument("--kernel", nargs="*", default=[""], help="print these: beginnings of kernel names")
    parser.add_argument("--json", type=Path, help="write all reports to this file")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is not installed: no CUDA kernel was compiled")
        return 2
    nvdisasm = find_nvdisasm(nvcc)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    print(re.search(r"release [^\n]+", version)[0], flush=True)
    if nvdisasm is None:
        print("no nvdisasm: instructions are not counted")
    reports, failed = [], 0
    for arch, (found, warnings, seconds) in zip(options.arch, builds(nvcc, nvdisasm, options.arch), strict=True):
        if found is None:
            print(f"sm_{arch}: {warnings}")
            failed += 1
            continue
        if warnings:
            print(warnings)
            failed += 1
        print(f"sm_{arch}: {len(found)} kernels in {seconds:.0f} s", flush=True)
        for report in found:
            if report["kernel"].startswith(tuple(options.kernel)):
                print(line(report), flush=True)
        reports += found
    if options.json:
        options.json.write_text(json.dumps({"nvcc": version.strip().splitlines()[-1], "reports": reports}, indent=1))
    bad = [report for report in reports if report["problems"]]
    for report in bad:
        print(line(report))
    print(f"{len(reports)} kernels, {len(bad)} with problems")
    return 1 if bad or failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
