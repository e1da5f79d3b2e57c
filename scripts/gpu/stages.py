# SPDX-License-Identifier: Apache-2.0
"""The stages of a GPU check, in order: what each runs, how long it may take, and what its files are read for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import findings
from findings import Failed

__all__ = ["STAGES", "Context", "Failed", "Stage"]
PRODUCT = ("kernels", "timesformer", "csrc")
KERNEL_TESTS = ("attention", "gradients", "faults", "memory_safety", "determinism", "packed", "fused")
REGISTRATION = ("tests/test_ops.py", "tests/test_fused_ops.py")
# Of all other tests those that ask for a GPU, or for what a machine has. The rest is CI's.
MACHINE_TESTS = ("session", "bad_input", "choice", "info", "registry", "warmup")
ON_GPU = "not cpp"  # a CPU's backend on four instruction sets: more than half of the kernels' tests, and CI's, too
# Of the tests a rehearsal collects all and runs these: the interpreter needs minutes for the rest.
CPU_TESTS = {
    "kernels": "triton and bitwise_as_apart and not global or test_eps or test_constant_rows",
    "registration": "(triton and opcheck or cpp and (vmap_grad or export or checkpoint or test_autocast)) and time",
    "rest": "test_grid or test_info or test_sampling",
}
# Beside these, the goals of benchmarks/goals.py speak of stock kernels on operands that lie ready.
GOAL_ROWS = "triton cuda sdpa sdpa-flash-no-copies sdpa-cudnn-no-copies copy"
COMPILED_ROWS = "triton cuda sdpa-packed flex-packed compile compile-reduce-overhead copy"
BATCH_ROWS = "triton cuda sdpa sdpa-flash sdpa-efficient sdpa-cudnn eager"


@dataclass(frozen=True)
class Context:
    """What a stage is given. folder: for its files; seconds: at most."""

    root: Path
    folder: Path
    mode: str  # "full", "quick", "cpu"
    seconds: float

    @property
    def cpu(self) -> bool:
        return self.mode == "cpu"

    @property
    def workers(self) -> int:
        """Processes that keep the processor busy without starving the one that drives the GPU."""
        cores = len(os.sched_getaffinity(0))
        return max(min(cores - 2, 14), 1)

    def environment(self) -> dict[str, str]:
        """Of every process: this tree before any installed package, no network, a GPU or none."""
        env = dict(os.environ)
        paths = [self.root / "kernels", self.root, self.root / "scripts" / "gpu", env.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "KINETO_LOG_LEVEL": "6"}
        for name in ("PYTEST_ADDOPTS", "TRITON_INTERPRET", "OUT"):
            env.pop(name, None)
        if self.cpu:
            env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        return env


@dataclass(frozen=True)
class Stage:
    """limits: seconds in a full, a quick and a CPU run, 0 where the stage is left out.

    commands(context) -> argument lists, run one after the other. finding(context) -> (one line, JSON-ready data), or
    raises Failed. sources: files and folders that, changed, make an earlier result void. always: runs every time.
    """

    name: str
    about: str
    limits: tuple[int, int, int]
    commands: Callable[[Context], list[list[str]]]
    finding: Callable[[Context], tuple[str, dict]]
    sources: tuple[str, ...] = PRODUCT
    always: bool = False

    def limit(self, mode: str) -> int:
        return self.limits[("full", "quick", "cpu").index(mode)]


def script(name: str, *options: str) -> Callable[[Context], list[list[str]]]:
    """One of the programs beside this file, which writes result.json."""

    def commands(context: Context) -> list[list[str]]:
        program = context.root / "scripts" / "gpu" / f"{name}.py"
        mode = ["--cpu"] if context.cpu else ["--quick"] if context.mode == "quick" else []
        return [[sys.executable, str(program), "--json", str(context.folder / "result.json"), *mode, *options]]

    files = {name, "probe", "calls", *(("sanitize",) if name == "sanitizers" else ())}
    commands.sources = tuple(f"scripts/gpu/{file}.py" for file in sorted(files))
    return commands


def pytest(context: Context, *arguments: str) -> list[str]:
    """A test run that survives the loss of the GPU and tells what it found however it ends."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_gpu", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={context.folder / 'junit.xml'}", f"--gpu-reports={context.folder / 'reports.jsonl'}"]
    if find_spec("xdist") and not context.cpu:
        command += ["-n", str(context.workers), "--max-worker-restart=50"]
        if find_spec("pytest_timeout"):
            command += ["--timeout=100", "--timeout-method=thread"]  # a kernel that hangs ends its worker, not the run
    return [*command, *arguments]


def kernel_files(context: Context) -> list[str]:
    names = [f"tests/test_{name}.py" for name in KERNEL_TESTS]
    found = sorted((context.root / "tests").glob("test_triton*.py"))
    names += [path.relative_to(context.root).as_posix() for path in found if path.stem != "test_triton_resources"]
    return [name for name in names if (context.root / name).exists()]


def kernel_tests(context: Context) -> list[list[str]]:
    few = ["-k", CPU_TESTS["kernels"] if context.cpu else ON_GPU]
    return [pytest(context, *few, *kernel_files(context))]


def other_tests(context: Context) -> list[list[str]]:
    if not context.cpu:
        return [pytest(context, *[f"tests/test_{name}.py" for name in MACHINE_TESTS])]
    done = {*kernel_files(context), *REGISTRATION}
    names = sorted(path.relative_to(context.root).as_posix() for path in (context.root / "tests").glob("test_*.py"))
    return [pytest(context, "-k", CPU_TESTS["rest"], *[name for name in names if name not in done])]


def registration(context: Context) -> list[list[str]]:
    few = ["-k", CPU_TESTS["registration"] if context.cpu else ON_GPU]
    return [pytest(context, *few, *[name for name in REGISTRATION if (context.root / name).exists()])]


def bench(tiny: str, *runs: str) -> Callable[[Context], list[list[str]]]:
    """Runs of `timesformer benchmark` that share the time of the stage; each begins no table after its budget.

    tiny: the options of a rehearsal.
    """

    def commands(context: Context) -> list[list[str]]:
        out = []
        quick = [run for run in runs if "--full" not in run]  # of those that compile for seconds, none
        chosen = [tiny + " --tiny"] if context.cpu else quick if context.mode == "quick" else runs
        for i, options in enumerate(chosen):
            file = context.folder / f"{i}.json"
            command = [sys.executable, "-m", "timesformer.cli", "benchmark", "--out", str(file), "--resume"]
            command += options.split()
            if not context.cpu and "--largest-batch" not in command:
                command += ["--budget", f"{0.8 * context.seconds / len(chosen):.0f}"]
                if context.mode == "quick" and "--seconds" not in command:
                    command += ["--seconds", "0.15"]
            out.append(command)
        return out

    return commands


def and_choose(commands: Callable[[Context], list[list[str]]]) -> Callable[[Context], list[list[str]]]:
    """Then DIR/choice.json: the rules by which `auto` would choose after these benchmarks."""

    def both(context: Context) -> list[list[str]]:
        program, out = context.root / "scripts" / "choose_backend.py", context.folder.parent / "choice.json"
        return [*commands(context), [sys.executable, str(program), str(context.folder), "--out", str(out)]]

    both.sources = ("scripts/choose_backend.py",)
    return both


# First what the goals speak of, then the peers at one shape, then those that must be compiled.
CORE = and_choose(
    bench(
        "--level core --scheme time --direction forward+backward",
        "--level core --frames 8 96 --img-size 224 448 --direction forward backward --seconds 0.15 --rows " + GOAL_ROWS,
        "--level core --seconds 0.15",
        "--level core --scheme time --direction forward --full --rows " + COMPILED_ROWS,
    )
)
ALL = bench(
    "--level core --scheme space --direction forward --rows sdpa",
    "--level core --frames 8 16 96 --img-size 224 448 --batch-size 8 64 --rows " + GOAL_ROWS,
    "--level core --full",
)
PEERS = bench(
    "--level core --scheme time --direction forward --rows sdpa --largest-batch 2",
    "--level core --scheme time --direction forward --largest-batch 2048 --rows " + BATCH_ROWS,
)
BLOCK = bench(
    "--level half-block block --direction forward",
    "--level half-block block --direction forward forward+backward",
)
MODEL = bench("--level model --rows ours", "--level model --batch-size 1 8 64")
TRAIN = bench("--level train --rows ours", "--level train")


def resources(context: Context) -> list[list[str]]:
    program = context.root / "scripts" / "triton_resources.py"
    command = [sys.executable, str(program), "--json", str(context.folder / "result.json")]
    if context.cpu:  # one shape: the whole table is what CI runs
        command += "--arch 90 --dtype bfloat16 --head-dim 64 --members 8 --workers 1".split()
    elif context.mode == "quick":
        command += "--arch 90 --dtype bfloat16 --head-dim 64".split()
    return [command]


def stage(name: str, about: str, limits: str, commands, finding=findings.plain, *more: str, always=False) -> Stage:
    """limits: "full quick cpu"; more: folders it depends on beside those of the package."""
    full, quick, cpu = map(int, limits.split())
    sources = (*PRODUCT, *getattr(commands, "sources", ()), *more)
    return Stage(name, about, (full, quick, cpu), commands, finding, sources, always)


STAGES = (
    stage("env", "versions, GPU, driver, clocks", "15 15 12", script("environment"), findings.env, always=True),
    stage("build", "the package, without network", "58 60 25", script("build_package"), always=True),
    stage("tests-kernels", "tests of the kernels", "120 42 34", kernel_tests, findings.tests, "tests"),
    stage("registration", "what torch does to an op", "40 20 28", registration, findings.registration, "tests"),
    stage("graphs", "CUDA graphs replayed on new inputs against eager", "20 20 20", script("graphs")),
    stage("streams", "side streams, threads, several GPUs", "12 12 12", script("streams")),
    stage("large", "65,536 clips or sequences, 2^31 elements, and more", "18 18 12", script("large")),
    stage("sanitizers", "memcheck, racecheck, initcheck of every kernel", "52 28 15", script("sanitizers")),
    stage("ceilings", "copy bandwidth and matrix products", "12 12 12", script("ceilings"), findings.ceilings),
    stage("bench-core", "attention, against every peer; choice.json", "54 15 14", CORE, findings.chosen),
    stage("bench-block", "half-block and block", "18 12 12", BLOCK, findings.bench),
    stage("bench-model", "TimeSformer-B, forward", "20 12 12", MODEL, findings.bench),
    stage("session", "CUDA graphs of a model's Session, milliseconds a call", "15 0 10", script("session")),
    stage("bench-train", "a training step with AdamW", "20 12 12", TRAIN, findings.bench),
    stage("peers", "largest batch of each peer, and why not more", "12 0 12", PEERS, findings.largest),
    stage("resources", "registers, spills, shared memory", "10 0 16", resources, findings.resources, "scripts"),
    stage("all-peers", "the long list of shapes and peers: with --only", "0 0 10", ALL, findings.bench),
    stage(
        "tests-rest", "other tests that ask for a GPU", "28 0 22", other_tests, findings.tests, "tests", "benchmarks"
    ),
)
