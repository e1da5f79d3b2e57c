# SPDX-License-Identifier: Apache-2.0
"""Measures problems: every row is checked first, then all rows of a group take turns, then the file has them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from .cost import costs, device_lost, largest, reason_of, release
from .machine import Ceilings, shares
from .problem import Problem
from .record import Record
from .timing import capture, interleave, noise, replay_error, summary, tensors, watch_of

AGAIN = "again"  # the first row of a group, timed a second time as if it were another one
GRAPH_LIMIT_MS = 5.0  # a graph saves launches: microseconds of a call


class DeviceLost(RuntimeError):
    """A row ended the CUDA context. It is recorded; the rest needs a new process."""


@dataclass(frozen=True)
class Protocol:
    """seconds: timing budget per row of a group, both caches and the graph together. least, most: rounds."""

    seconds: float = 0.3
    least: int = 5
    most: int = 200
    warmup: int = 2
    graphs: bool = True
    costs: bool = True  # memory, saved bytes, determinism


@dataclass
class Run:
    """One run over many problems. step(text) announces what is done next."""

    record: Record
    facts: dict
    ceilings: Ceilings
    protocol: Protocol
    device: str
    step: Callable[[str], None] = lambda text: None
    deadline: float | None = None  # on time.monotonic: no group is begun after it
    rows: tuple[str, ...] | None = None  # only these
    full: bool = False

    def problem(self, problem: Problem, directions: tuple[str, ...] | None = None) -> None:
        """Measure a problem. Where even its inputs cannot be made, the run says so and goes on."""
        try:
            for direction in directions or problem.directions:
                self.group(problem, direction)
        except DeviceLost:
            raise
        except Exception as error:
            if device_lost(error, self.device):
                raise DeviceLost(reason_of(error)) from error
            failed = self.record.result["machine_info"].get("failed", [])
            self.record.note("failed", [*failed, f"{problem.op} {problem.shape.label}: {reason_of(error)}"])
        problem.close()
        release(self.device)

    def names(self, problem: Problem) -> list[str]:
        """The rows of a problem that were asked for."""
        return [row for row in problem.rows(self.full) if self.rows is None or row in self.rows]

    def group(self, problem: Problem, direction: str) -> None:
        group = problem.group(direction)
        names = [row for row in self.names(problem) if self.record.get(group, row) is None]
        if not names:
            return
        if self.deadline is not None and time.monotonic() > self.deadline:
            left = self.record.result["machine_info"].get("left_out", [])
            self.record.note("left_out", [*left, group])
            return
        base = self._base(problem, direction)
        with torch.set_grad_enabled(direction != "forward"):
            ready = {}
            for row in names:
                self.step(f"{group}: {row}")
                info = {**base, "flops": problem.flops(row, direction), "bytes": problem.nbytes(row, direction)}
                try:
                    if reason := problem.why_not(row):
                        raise Unable(reason)
                    ready[row] = info | self._prepare(problem, row, direction)
                except Exception as error:
                    self._failed(group, row, info, error)
                    problem.drop(row)
                    release(self.device)
            if not ready:
                return
            try:
                self._time(problem, direction, group, ready)
            except DeviceLost:
                raise
            except Exception as error:
                for row, info in ready.items():
                    self.record.add(group, row, {**info, "interleaved_median_ms": None, "reason": reason_of(error)})
                if device_lost(error, self.device):
                    raise DeviceLost(f"{group}: {reason_of(error)}") from error

    def _failed(self, group: str, row: str, info: dict, error: Exception) -> None:
        reason = str(error) if isinstance(error, Unable) else reason_of(error)
        self.record.add(group, row, {**info, "interleaved_median_ms": None, "reason": reason})
        if device_lost(error, self.device):
            raise DeviceLost(f"{group}: {row}: {reason}") from error

    def _base(self, problem: Problem, direction: str) -> dict:
        dtype = str(problem.dtype).removeprefix("torch.")
        found = dict(kind=problem.kind, op=problem.op, shape=str(problem.shape), dtype=dtype, direction=direction)
        sizes = dict(frames=problem.shape.frames, locations=problem.shape.locations, batch=problem.shape.batch)
        return {**self.facts, **self.ceilings.rates(problem.dtype), **found, **sizes}

    def _prepare(self, problem: Problem, row: str, direction: str) -> dict:
        """Checks the row; what it costs beside time."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                errors = problem.check(row, direction)
            except RuntimeError as error:
                # Stock attention refuses in general terms and gives its reasons as warnings.
                why = [str(w.message).split("(Triggered")[0].strip() for w in said if "attention" in str(w.message)]
                raise Unable(f"{reason_of(error)} {' '.join(why)}".strip()) from error
        gradients = [error for name, error in errors.items() if name != "out"]
        info = {"max_err": errors["out"], "max_err_grad": max(gradients, default=None), **problem.facts(row)}
        if not self.protocol.costs or row in ("copy", "products"):
            return info
        return info | costs(problem, row, direction)

    def _time(self, problem: Problem, direction: str, group: str, ready: dict[str, dict]) -> None:
        self.step(f"{group}: timing {len(ready)} rows")
        calls = {row: problem.timed(row, direction) for row in ready}
        own = next((row for row in ready if row not in ("copy", "products")), None)
        if own is not None:
            calls[AGAIN] = calls[own]
        cold = self._rounds(calls, True, 0.4)
        warm = self._rounds(calls, False, 0.2)
        for row, info in ready.items():
            times = summary(cold[row])
            info.update({f"interleaved_{name}": value for name, value in times.items()})
            info.update(shares(times["median_ms"], info["flops"], info["bytes"], self._rates(info)))
            info.update({f"warm_{name}": value for name, value in summary(warm[row]).items() if name != "median_ms"})
            if own is not None:
                info.update(noise=noise(cold[own], cold[AGAIN]), warm_noise=noise(warm[own], warm[AGAIN]), noise_of=own)
        if self.device == "cuda" and self.protocol.graphs and direction in ("forward", "backward", "forward+backward"):
            self._replay(group, {row: calls[row] for row in ready}, ready, own)
        for row, info in ready.items():
            self.record.add(group, row, info, warm_ms=summary(warm[row])["median_ms"])

    @staticmethod
    def _rates(info: dict) -> dict:
        return {name: value for name, value in info.items() if name.startswith("peak_") and name != "peak_bytes"}

    @cached_property
    def _watch(self):
        return watch_of(self.device)

    def _rounds(self, calls: dict, cold: bool, share: float) -> dict[str, list[float]]:
        """Samples of every row, in turn; one by one where they do not fit into memory together."""
        limits = dict(warmup=self.protocol.warmup, least=self.protocol.least, most=self.protocol.most)
        limits.update(watch=self._watch, cold=cold)
        seconds = self.protocol.seconds * share
        try:
            return interleave(calls, seconds=seconds * len(calls), **limits)
        except torch.cuda.OutOfMemoryError:
            release(self.device)
            return {row: interleave({row: call}, seconds=seconds, **limits)[row] for row, call in calls.items()}

    def _replay(self, group: str, calls: dict, ready: dict[str, dict], own: str | None) -> None:
        """Rows short enough that launches matter, as CUDA graphs, each compared with a plain call of the row."""
        graphs = {}
        for row, call in calls.items():
            if ready[row]["interleaved_median_ms"] > GRAPH_LIMIT_MS:
                ready[row]["graph_reason"] = f"longer than {GRAPH_LIMIT_MS:g} ms"
            elif row.startswith(("compile-max", "compile-reduce")):
                ready[row]["graph_reason"] = "its compiler makes CUDA graphs of its own"
            else:
                try:
                    graphs[row] = self._graph(call, None if row in ("copy", "products") else call)
                except Exception as error:
                    ready[row]["graph_reason"] = reason_of(error)
                    if device_lost(error, self.device):
                        self._failed(group, row, ready[row], error)
        if own in graphs:
            graphs[AGAIN] = graphs[own]
        for cold in (True, False):
            if graphs:
                times = self._rounds({row: graph.replay for row, graph in graphs.items()}, cold, 0.2)
                for row in graphs.keys() - {AGAIN}:
                    prefix = "graph_" if cold else "graph_warm_"
                    ready[row].update({prefix + name: value for name, value in summary(times[row]).items()})
                    if own in graphs:
                        ready[row][prefix + "noise"] = noise(times[own], times[AGAIN])

    @staticmethod
    def _graph(call, plain):
        """plain: the call whose results a replay must reproduce, None where there are none."""
        expected = tuple(x.clone() for x in tensors(plain())) if plain is not None else ()
        graph, outputs = capture(call)
        if plain is not None:
            error = replay_error(graph, outputs, expected)
            if not error <= 1e-2:  # the limit of rows that sum in any order; a kernel left out gives NaN
                raise RuntimeError(f"the replay of its CUDA graph differs by {error:.1e}")
        return graph

    def largest_batch(self, make: Callable[[int], Problem], direction: str, row: str, most: int) -> None:
        """The largest power of two of clips for which a row runs, and what stops it at twice as many."""
        first = make(1)
        group = f"largest batch of {first.group(direction)}"
        if self.record.get(group, row) is not None:
            return
        info = {**self._base(first, direction), "kind": "largest", "interleaved_median_ms": None}
        if reason := first.why_not(row):
            self.record.add(group, row, {**info, "largest": None, "reason": reason})
            return

        def attempt(batch):
            self.step(f"{group}: {row}, {batch}")
            self._attempt(make(batch), direction, row)

        try:
            batch, reason = largest(attempt, self.device, most)
        except Exception as error:  # it ended the device
            reason = reason_of(error)
            self.record.add(group, row, {**info, "largest": getattr(error, "batch", 1) // 2, "reason": reason})
            raise DeviceLost(f"{group}: {row}: {reason}") from error
        self.record.add(group, row, {**info, "largest": batch, "reason": reason})

    def _attempt(self, problem: Problem, direction: str, row: str) -> None:
        with torch.set_grad_enabled(direction != "forward"):
            outputs = tensors(problem.timed(row, direction)())
        self._watch.sync()
        finite = all(x[-1].isfinite().all() for x in outputs)
        problem.close()
        if not finite:
            raise RuntimeError("the result of the last clip is not finite")


class Unable(RuntimeError):
    """A row cannot run; the text is the reason."""
