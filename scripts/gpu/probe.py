# SPDX-License-Identifier: Apache-2.0
"""What the programs of the stages share: options, the device, a list of checks, and the file they end with."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

SKIPPED = 77  # exit status that the runner takes for "nothing to do here"
BACKENDS = ("triton", "cuda")  # whose kernels run on a GPU


def options(description: str, *more) -> argparse.Namespace:
    """--json, --cpu, --quick, and (name, arguments of add_argument) each of `more`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="the result")
    parser.add_argument("--cpu", action="store_true", help="rehearse on tiny shapes in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    for name, arguments in more:
        parser.add_argument(name, **arguments)
    args = parser.parse_args()
    if not args.cpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU; --cpu rehearses without one")
    return args


def backends_or_raise(checks: Checks, device: str, dtype) -> list[str]:
    """The backends under test. The result says why the others cannot run. Raises RuntimeError where none can."""
    from timesformer_kernels import registry

    reasons = {name: registry.get(name).why_not(device, dtype, 64) for name in BACKENDS}
    checks.facts["cannot run"] = unable = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(unable) == len(BACKENDS):
        raise RuntimeError("; ".join(f"backend {name} cannot run: {reason}" for name, reason in unable.items()))
    return [name for name in BACKENDS if name not in unable]


def without(checks: Checks) -> str:
    """Of the line of the table: which backends could not run, "" where all could."""
    return "".join(f"; {name} cannot run: {reason}" for name, reason in checks.facts["cannot run"].items())


class Checks:
    """Named outcomes of one program; a failed one does not end it."""

    def __init__(self, json: Path | None, about: str):
        self.json, self.about, self.found, self.facts, self.count = json, about, {}, {}, 0

    def add(self, name: str, ok: bool, text: str = "", **facts) -> None:
        print(f"{'ok' if ok else 'FAILED':<7}{name}  {text}".rstrip(), flush=True)
        self.found[name] = {"ok": bool(ok), "text": text, **facts}

    @contextmanager
    def check(self, name: str):
        """A check that passes unless its block raises; `with ... as say:` and say(text, fact=...) adds to its line."""
        said, facts, start = [], {}, time.perf_counter()

        def say(text: str, **more) -> None:
            said.append(text)
            facts.update(more)

        try:
            yield say
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
            self.add(name, False, f"{type(error).__name__}: {lines[0]}"[:300], **facts)
        else:
            self.add(name, True, "; ".join(said), seconds=round(time.perf_counter() - start, 2), **facts)

    def end(self, finding: str | None = None) -> int:
        """Writes the file; the exit status. finding: the line of the table, by default how many checks passed."""
        bad = [name for name, check in self.found.items() if not check["ok"]]
        ok = bool(self.found) and not bad
        if bad:
            finding = f"{len(bad)} of {len(self.found)} {self.about} failed: {bad[0]}: {self.found[bad[0]]['text']}"
        finding = finding or f"{len(self.found)} {self.about}"
        result = {"ok": ok, "finding": finding, **self.facts, "checks": self.found}
        if self.json:
            self.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(finding)
        return 0 if ok else 1


def skip(reason: str) -> None:
    print(reason)
    sys.exit(SKIPPED)
