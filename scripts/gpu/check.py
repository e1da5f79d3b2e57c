# SPDX-License-Identifier: Apache-2.0
"""Runs the stages of `stages.py` one after the other: the program behind scripts/gpu_check.sh.

Imports nothing but the standard library, so that a broken installation is a failed stage and not the end of the run.

Under DIR: STAGE.json (the result), STAGE.log (all output), STAGE/ (files of the stage), summary.json, and
results.tar.gz with all of that, written anew after every stage. A stage that passed is skipped when the command runs
again, unless sources, versions, device or mode have changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from stages import STAGES, Context, Failed, Stage

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"full": 530, "quick": 280, "cpu": 290}  # of a whole run, so that it ends within 9, 5 and 5 minutes
SKIPPED = 77  # exit status of a stage that has nothing to do here; its last line of output says why
GRACE = 5.0  # seconds between the request to stop and the end of a stage's processes
PACKED = 64 << 20  # a larger file stays out of results.tar.gz
WORDS = {"passed": "passed", "failed": "FAILED", "timed out": "TIMED OUT", "skipped": "skipped", "not run": "NOT RUN"}
BAD = ("failed", "timed out", "not run")


@dataclass
class Run:
    """One invocation. seconds: for all stages; what one leaves is for those after it."""

    folder: Path
    mode: str
    seconds: float
    force: bool = False
    stages: tuple[Stage, ...] = STAGES

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started, self.facts = time.monotonic(), {}

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def path(self, stage: Stage, suffix: str = ".json") -> Path:
        return self.folder / (stage.name + suffix)

    def go(self, chosen: tuple[Stage, ...]) -> dict[str, dict]:
        """{stage: result} of the chosen stages, in order. What one does never keeps the next from running."""
        results = {}
        for i, stage in enumerate(chosen):
            key = self.fingerprint(stage)
            before = None if self.force or stage.always else self.passed(stage, key)
            if before is not None:
                results[stage.name] = {**before, "status": "skipped", "kept": True}
                results[stage.name]["finding"] = f"passed before: {before['finding']}"
            else:
                later = sum(s.limit(self.mode) for s in chosen[i + 1 :])
                results[stage.name] = self.run(stage, key, share(self.left(), stage.limit(self.mode), later))
            result = results[stage.name]
            print(line(stage.name, result), flush=True)
            self.pack(results)
        return results

    def passed(self, stage: Stage, key: str) -> dict | None:
        """The result of an earlier run that need not be repeated."""
        result = self.result(stage) or {}
        return result if result.get("status") == "passed" and result.get("fingerprint") == key else None

    def result(self, stage: Stage) -> dict | None:
        """What DIR holds of a stage."""
        try:
            return json.loads(self.path(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def fingerprint(self, stage: Stage) -> str:
        """Of all that a result depends on: sources, mode, and the facts of the environment."""
        digest = hashlib.sha256(json.dumps([self.mode, self.facts], sort_keys=True).encode())
        for name in stage.sources:
            for path in [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*")):
                if path.suffix in (".py", ".json", ".cpp", ".h", ".cu", ".cuh") and path.name != "_build_info.json":
                    digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def run(self, stage: Stage, key: str, allowance: float) -> dict:
        """Runs a stage and writes its result. allowance: its own limit, and what the stages before it saved."""
        result = {"stage": stage.name, "about": stage.about, "fingerprint": key, "mode": self.mode}
        result |= {"status": "not run", "seconds": 0.0, "finding": "no time left: run the same command again"}
        if allowance < 2 * GRACE:
            self.write(self.path(stage), result)
            return result
        print(f"{stage.name}: {stage.about} (at most {allowance:.0f} s)", flush=True)
        data = self.folder / stage.name
        if data.exists() and (self.force or (self.result(stage) or {}).get("fingerprint") != key):
            shutil.rmtree(data)  # of other sources; what a stopped stage left of the same ones is gone on with
        data.mkdir(exist_ok=True)
        self.write(self.path(stage), {**result, "finding": "did not end"})
        context = Context(ROOT, data, self.mode, allowance - GRACE)
        start = time.monotonic()
        try:
            commands = stage.commands(context)
            result["commands"] = [shlex.join([Path(c[0]).name, *c[1:]]).replace(f"{ROOT}/", "") for c in commands]
            result["commands"] = [c.replace(str(self.folder), "DIR") for c in result["commands"]]
            status, text = self.execute(commands, context, self.path(stage, ".log"))
        except Exception as error:  # a mistake of the stage's own; it must not end the run
            status, text = "failed", f"{type(error).__name__}: {error}"
        result |= {"status": status, "seconds": round(time.monotonic() - start, 1), "finding": text}
        if status != "skipped":
            self.judge(stage, context, result)
        if stage.name == "env":
            self.facts = result.get("data", {}).get("identity", {})
        self.write(self.path(stage), result)
        return result

    def execute(self, commands, context: Context, log: Path) -> tuple[str, str]:
        """(status, one line) of the commands of a stage, all of them, whatever becomes of the first."""
        deadline, status, text = time.monotonic() + context.seconds, "passed", ""
        with open(log, "w", encoding="utf-8") as out:
            for command in commands:
                out.write(f"+ {shlex.join(command)}\n")
                out.flush()
                code = self.one(command, context, out, deadline)
                if code is None:
                    return "timed out", f"stopped after {context.seconds:.0f} s"
                if code and not (code == SKIPPED and status == "passed"):
                    status, text = "failed", f"exit status {code}"
                elif code == SKIPPED:
                    status = "skipped"
        if status != "passed":
            last = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()][-1]
            text = last if status == "skipped" else f"{text}: {last}"
        return status, text[:300]

    def one(self, command: list[str], context: Context, out, deadline: float) -> int | None:
        """Exit status of a command, None where its time was up; nothing it started is left running."""
        process = subprocess.Popen(
            command, cwd=ROOT, env=context.environment(), stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            signal_group(process, signal.SIGINT)  # a test run then still writes its report
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            signal_group(process, signal.SIGKILL)
            process.wait()

    def judge(self, stage: Stage, context: Context, result: dict) -> None:
        """What the files of a stage say. It may turn a pass into a failure, never a failure into a pass."""
        said = result["finding"] if result["status"] != "passed" else ""
        try:
            found, result["data"] = stage.finding(context)
        except Failed as error:
            found, result["data"] = str(error), error.data
            said = said if result["status"] == "timed out" else ""  # the finding tells more than an exit status
            result["status"] = "failed" if result["status"] == "passed" else result["status"]
        except Exception as error:
            text = str(error).replace(str(self.folder), "DIR")
            found = "" if said else f"no result: {type(error).__name__}: {text}"
            result["status"] = "failed" if result["status"] == "passed" else result["status"]
        result["finding"] = "; ".join(filter(None, [said, found]))[:400]

    def write(self, path: Path, value: dict) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def pack(self, results: dict[str, dict]) -> None:
        """summary.json and results.tar.gz, whole or not at all."""
        total = {"mode": self.mode, "seconds": round(self.seconds - self.left(), 1), "facts": self.facts}
        self.write(self.folder / "summary.json", {**total, "ok": ok(results), "stages": results})
        archive = self.folder / "results.tar.gz"
        with tarfile.open(archive.with_suffix(".partial"), "w:gz", compresslevel=1) as tar:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and path.suffix not in (".gz", ".partial") and path.stat().st_size < PACKED:
                    tar.add(path, path.relative_to(self.folder).as_posix(), filter=anonymous)
        os.replace(archive.with_suffix(".partial"), archive)


def share(left: float, own: float, later: float) -> float:
    """Seconds for a stage: what the later ones do not need; of less than all need, a part as large as its limit's."""
    return max(left - later, left * own / max(own + later, 1e-9))


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def signal_group(process: subprocess.Popen, number: int) -> None:
    """To a stage's process and all its children: they are a session of their own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def ok(results: dict[str, dict]) -> bool:
    return all(result["status"] not in BAD for result in results.values())


def line(name: str, result: dict) -> str:
    return f"{name:<14}{WORDS[result['status']]:<11}{result['seconds']:>7.1f} s  {result['finding']}"


def summary(results: dict[str, dict]) -> str:
    """The table that ends a run."""
    count = {word: sum(result["status"] == word for result in results.values()) for word in WORDS}
    total = ", ".join(f"{n} {word}" for word, n in count.items() if n)
    return "\n".join(["", *(line(name, result) for name, result in results.items()), total])


def choose(names: str | None, stages: tuple[Stage, ...], mode: str) -> tuple[Stage, ...]:
    """Stages of the mode; names: only these, "bench" for all that begin with "bench-". Raises ValueError."""
    if names is None:
        return tuple(stage for stage in stages if stage.limit(mode))
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if not any(matches(name, stage) for stage in stages):
            raise ValueError(f"--only: got {name!r}, expected some of {', '.join(stage.name for stage in stages)}")
    return tuple(stage for stage in stages if stage.always or any(matches(name, stage) for name in wanted))


def matches(name: str, stage: Stage) -> bool:
    return stage.name == name or stage.name.startswith(f"{name}-")


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Everything that needs a GPU, in one command.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results; a run with the same DIR goes on there")
    parser.add_argument("--quick", action="store_true", help="fewer tests and benchmarks, about half the time")
    parser.add_argument("--cpu", action="store_true", help="rehearse all stages without a GPU, on tiny shapes")
    parser.add_argument("--only", metavar="STAGE,...", help="these stages, and what every run begins with")
    parser.add_argument("--force", action="store_true", help="repeat stages that have passed")
    parser.add_argument("--seconds", type=float, help="of the whole run (default: 530, with --quick 280, --cpu 290)")
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    args = parser.parse_args(argv)
    if args.quick and args.cpu:
        parser.error("--quick and --cpu: expected at most one of them")
    args.mode = "cpu" if args.cpu else "quick" if args.quick else "full"
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds: got {args.seconds:g}, expected a positive number")
    try:
        args.stages = choose(args.only, STAGES, args.mode)
    except ValueError as error:
        parser.error(str(error))
    if args.out is None and not args.list:
        parser.error("--out: a folder for the results is needed")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
    if args.out is not None and args.out.exists() and any(args.out.iterdir()) and not (args.out / "env.json").exists():
        parser.error(
            f"--out: {args.out} holds other files than results of this command, which deletes old ones of its own"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    if args.list:
        for stage in args.stages:
            print(f"{stage.name:<14}{stage.limit(args.mode):>4.0f} s  {stage.about}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stage that runs, then this
    run = Run(args.out.resolve(), args.mode, args.seconds or SECONDS[args.mode], args.force)
    results = run.go(args.stages)
    print(summary(results))
    print(f"{run.folder / 'summary.json'}")
    return 0 if ok(results) else 1


if __name__ == "__main__":
    sys.exit(main())
