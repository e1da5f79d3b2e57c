# SPDX-License-Identifier: Apache-2.0
"""memcheck, racecheck and initcheck of `sanitize.py`, side by side, and two mistakes that they must find.

Errors count where they lie in a kernel of ours; those of other libraries' kernels are listed. Without a GPU: the
program alone, without the tools.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from probe import Checks, options, skip

PROGRAM = str(Path(__file__).with_name("sanitize.py"))
ROOT = Path(__file__).resolve().parents[2]
KERNELS, CUDA = ROOT / "kernels/timesformer_kernels/backends/triton", ROOT / "csrc/cuda"
TOOLS = ("memcheck", "racecheck", "initcheck")
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


def start(tool: str, *arguments: str) -> subprocess.Popen:
    command = [shutil.which("compute-sanitizer"), "--tool", tool, *known(), sys.executable, PROGRAM, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    runs = {tool: start(tool) for tool in TOOLS} | {kind: start(PLANTS[kind], "--plant", kind) for kind in PLANTS}
    outputs = {}
    for name, process in runs.items():
        outputs[name] = process.communicate()[0]
        if args.json:
            args.json.with_name(f"{name}.log").write_text(outputs[name], encoding="utf-8")
    if all(any(text in output for text in UNSUPPORTED) for output in outputs.values()):
        skip("compute-sanitizer does not support this device")
    for tool in TOOLS:
        said = read(tool, outputs[tool], names)
        ended = END in outputs[tool]
        text = said["text"] if ended else f"{said['text']}; the program did not run to its end"
        first = f"; {said['ours'][0]['kind']} in {said['ours'][0]['kernel']}" if said["ours"] else ""
        checks.add(tool, said["ok"] and ended, text + first, ours=said["ours"][:20], others=said["others"])
    for kind, tool in PLANTS.items():
        said = read(tool, outputs[kind], {f"planted_{kind}"})
        checks.add(f"planted {kind}", bool(said["ours"]), f"{tool} finds it" if said["ours"] else f"{tool} is blind")
    return checks.end("memcheck, racecheck, initcheck clean; both planted mistakes found")


if __name__ == "__main__":
    sys.exit(main())
