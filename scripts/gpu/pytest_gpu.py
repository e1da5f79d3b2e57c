# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for tests on a GPU: python -m pytest -p pytest_gpu --gpu-reports FILE.

Writes a line of JSON per test as it ends, so that a run which is stopped has told what it found. A run with the same
file goes on behind the tests that passed. Tests of the GPU's kernels come first. A test that lacks an optional package
is skipped with the reason. A worker of pytest-xdist whose CUDA context was lost ends, and another takes its place.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

OPTIONAL = {"av", "hypothesis", "huggingface_hub", "matplotlib", "pytest_benchmark", "safetensors", "timm", "tqdm"}
OPTIONAL |= {"transformers", "ninja", "setuptools", "PIL"}
LOST = 70  # exit status
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores


def pytest_addoption(parser):
    parser.addoption("--gpu-reports", type=Path, metavar="FILE", help="a line of JSON for every test that ended")


def pytest_configure(config):
    path = config.getoption("--gpu-reports")
    passed = set()
    if path is not None and path.exists():
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found = {report["id"]: report["outcome"] for report in lines if "id" in report}
        passed = {name for name, outcome in found.items() if outcome == "passed"}
    config.pluginmanager.register(Reports(path, passed, hasattr(config, "workerinput")))


def missing(error: BaseException | None) -> str | None:
    """The optional package whose absence is behind an error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            name = error.name.split(".")[0]
            if name in OPTIONAL and importlib.util.find_spec(name) is None:
                return name
        error = error.__cause__ or error.__context__
    return None


def context_lost() -> bool:
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Reports:
    """passed: ids that need not run again. worker: of pytest-xdist, whose reports the main process writes."""

    def __init__(self, path: Path | None, passed: set[str], worker: bool):
        self.path, self.passed, self.worker, self.selected = None if worker else path, passed, worker, False

    def select(self, count: int) -> None:
        """How many tests are to run, once: a worker that dies can take a test with it that nobody reports."""
        if not self.selected:
            self.selected = True
            self.append({"selected": count})

    def pytest_collection_finish(self, session):
        self.select(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.select(len(ids))

    def pytest_collection_modifyitems(self, config, items):
        again = [item for item in items if item.nodeid not in self.passed]
        if len(again) < len(items) and again:  # pytest calls a run without any test a failure
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.passed])
            items[:] = again
        items.sort(key=lambda item: "triton" not in item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        call = getattr(report, "call", None)
        name = missing(call.excinfo.value) if report.outcome == "failed" and call and call.excinfo else None
        if name:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {name} is not installed")
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = missing(call.excinfo.value) if report.outcome == "failed" and call.excinfo else None
        if name:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: {name} is not installed")
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report, "error" if report.when != "call" else "failed")

    def pytest_collectreport(self, report):
        if report.outcome != "passed":
            self.write(report.nodeid, report, "error")

    def pytest_runtest_logfinish(self, nodeid, location):
        if self.worker and context_lost():
            os._exit(LOST)

    def write(self, name: str, report, bad: str) -> None:
        outcome = {"failed": bad}.get(report.outcome, report.outcome)
        line = {"id": name, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 2)}
        if outcome != "passed":
            line["reason"] = reason(report)
        self.append(line)

    def append(self, line: dict) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def reason(report) -> str:
    """Why a test was skipped, or the line of its failure that says most."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:600]
