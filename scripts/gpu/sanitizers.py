# SPDX-License-Identifier: Apache-2.0
"""memcheck, racecheck and initcheck of `sanitize.py`, in parts side by side, and two mistakes that they must find.

Errors count where they lie in a kernel of ours; those of other libraries' kernels are listed. Without a GPU: the
program alone, without the tools.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from probe import Checks, options, skip

PROGRAM = str(Path(__file__).with_name("sanitize.py"))
ROOT = Path(__file__).resolve().parents[2]
KERNELS, CUDA = ROOT / "kernels/timesformer_kernels/backends/triton", ROOT / "csrc/cuda"
TOOLS = {"memcheck": 3, "racecheck": 6, "initcheck": 4}  # processes among which the calls are divided
PLANTS = {"write": "memcheck", "read": "initcheck"}
OPTIONS = {
    "--target-processes": "application-only",  # not the compilers that a kernel's first call starts
    "--print-limit": "1000",
    "--show-backtrace": "device",
    "--report-api-errors": "no",  # torch tries things out, and asks for the error
}
END = "calls ran to their end"  # of sanitize.py, which this must not import: it imports triton
UNSUPPORTED = ("Device not supported", "not supported on this device")


def kernel_names() -> set[str]:
    """Names of all functions compiled for the GPU."""
    text = "".join(path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py"))
    cuda = "".join(path.read_text(encoding="utf-8") for path in CUDA.glob("*.cuh"))
    return {
        *re.findall(r"^@triton\.jit(?:\(.*?\))?\ndef (\w+)", text, re.M | re.S),
        *re.findall(r"^__global__ void(?: __launch_bounds__\(.*?\))?\s+(\w+)\(const __grid_constant__", cuda, re.M),
    }


def records(output: str) -> list[dict]:
    """[{"kind", "kernel"}] of every error that a tool printed; kernel None where it names none."""
    found = []
    for text in re.split(r"^========= (?=\S)", output, flags=re.M)[1:]:
        head = text.splitlines()[0].strip()
        if not re.match(r"(Invalid|Uninitialized|Misaligned|Out-of-range|Error: |Warning: |Potential|Race)", head):
            continue
        place = re.search(r"\bat (?:\S.*?[\s:])??(\w+)(?:<.*>)?(?:\(.*?\))?\+0x", text)
        place = place or re.search(r"\bin (\w+)\s*$", text, re.M)
        found.append({"kind": head, "kernel": place[1] if place else None})
    return found


def read(tool: str, output: str, names: set[str]) -> dict:
    """What a tool said. {"ok", "text", "ours", "others"}; not ok, too, where it did not run to its end."""
    total = re.search(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", output, re.M)
    if not total:
        lines = [line for line in output.splitlines() if line.strip()]
        return {"ok": False, "text": f"no summary: {lines[-1] if lines else 'no output'}", "ours": [], "others": []}
    found = records(output)
    errors = [record for record in found if not record["kind"].startswith("Warning")]
    ours = [record for record in errors if record["kernel"] in names or record["kernel"] is None]
    others = [record for record in found if record not in ours]
    text = total[1].strip()
    unread = not found and not re.match(r"0 (errors|hazards)", text)  # a form of report this does not know
    return {"ok": not ours and not unread, "text": text, "ours": ours, "others": others[:20]}


@lru_cache(maxsize=1)
def known() -> list[str]:
    """Of OPTIONS those that this release of the tools has."""
    done = subprocess.run([shutil.which("compute-sanitizer"), "--help"], capture_output=True, text=True)
    have = set(re.findall(r"[\w-]+", done.stdout + done.stderr))
    fit = [(flag, value) for flag, value in OPTIONS.items() if flag in have and (value.isdigit() or value in have)]
    return [word for pair in fit for word in pair]


def start(log: Path, tool: str, *arguments: str) -> subprocess.Popen:
    """A process of the tool that writes to a file: a full pipe would have it wait for those read before it."""
    command = [shutil.which("compute-sanitizer"), "--tool", tool, *known(), sys.executable, PROGRAM, *arguments]
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def together(tool: str, outputs: list[str], names: set[str]) -> dict:
    """read() of all parts of a tool's calls, as one; "calls": how many ran. The text is that of the first that is bad,
    or what all of them say."""
    parts = []
    for output in outputs:
        said, calls = read(tool, output, names), re.search(rf"^(\d+) {END}$", output, re.M)
        if not calls:
            said |= {"ok": False, "text": f"{said['text']}; the program did not run to its end"}
        parts.append({**said, "calls": int(calls[1]) if calls else 0})
    worst = min(parts, key=lambda part: part["ok"])
    lists = {key: [record for part in parts for record in part[key]] for key in ("ours", "others")}
    return {"ok": worst["ok"], "text": worst["text"], "calls": sum(part["calls"] for part in parts), **lists}


def compiled_before() -> None:
    """All kernels into Triton's cache, by many processes: under a tool one would compile them one after the other."""
    parts = max(min(len(os.sched_getaffinity(0)), 12), 1)
    began = time.perf_counter()
    started = [subprocess.Popen([sys.executable, PROGRAM, "--part", f"{k}/{parts}"]) for k in range(parts)]
    codes = [process.wait() for process in started]
    print(f"compiled in {time.perf_counter() - began:.0f} s, exit statuses {codes}", flush=True)


def main() -> int:
    args = options(__doc__.split(",")[0] + ".")
    checks = Checks(args.json, "runs")
    if args.cpu:
        done = subprocess.run([sys.executable, PROGRAM, "--cpu"], capture_output=True, text=True)
        print(done.stdout + done.stderr)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        checks.add("program", done.returncode == 0 and END in done.stdout, lines[-1])
        names = kernel_names()
        checks.add("kernel names", "resident_forward" in names, f"{len(names)} functions")
        return checks.end(f"rehearsal, no tool: {lines[-1]}")
    if not shutil.which("compute-sanitizer"):
        skip("compute-sanitizer is not on PATH")
    compiled_before()
    names = kernel_names()
    with tempfile.TemporaryDirectory() as scratch:
        logs = {(tool, k): Path(scratch) / f"{tool}-{k}.log" for tool, n in TOOLS.items() for k in range(n)}
        runs = [start(log, tool, "--part", f"{k}/{TOOLS[tool]}") for (tool, k), log in logs.items()]
        plants = {kind: Path(scratch) / f"{kind}.log" for kind in PLANTS}
        runs += [start(log, PLANTS[kind], "--plant", kind) for kind, log in plants.items()]
        for process in runs:
            process.wait()
        read_text = lambda path: path.read_text(encoding="utf-8", errors="replace")  # noqa: E731
        outputs = {tool: [read_text(log) for (name, _), log in logs.items() if name == tool] for tool in TOOLS}
        planted = {kind: read_text(log) for kind, log in plants.items()}
    if args.json:
        for name, parts in outputs.items():
            args.json.with_name(f"{name}.log").write_text("".join(parts), encoding="utf-8")
    if all(any(text in output for text in UNSUPPORTED) for parts in outputs.values() for output in parts):
        skip("compute-sanitizer does not support this device")
    for tool, parts in outputs.items():
        said = together(tool, parts, names)
        first = f"; {said['ours'][0]['kind']} in {said['ours'][0]['kernel']}" if said["ours"] else ""
        text = f"{said['calls']} calls: {said['text']}{first}"
        checks.add(tool, said["ok"], text, ours=said["ours"][:20], others=said["others"][:20])
    for kind, tool in PLANTS.items():
        said = read(tool, planted[kind], {f"planted_{kind}"})
        checks.add(f"planted {kind}", bool(said["ours"]), f"{tool} finds it" if said["ours"] else f"{tool} is blind")
    return checks.end("memcheck, racecheck, initcheck clean; both planted mistakes found")


if __name__ == "__main__":
    sys.exit(main())
