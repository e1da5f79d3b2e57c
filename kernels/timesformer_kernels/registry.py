# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: one ordered list, a reason from each backend that cannot, and between those of a GPU the rules of
`choice`, by architecture, dtype, head dimension and length of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import choice
from .grid import Scheme, View, check_grid, check_qkv, view_of_frames
from .grid import view as make_view


@dataclass(frozen=True)
class Backend:
    """An implementation of attention over a `grid.View`. Backends never import one another.

    forward(q, k, v, view, scale, cls_weights, stats=None) -> out [B, S, H, D], contiguous. stats is filled when given
    backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None) -> (dq, dk, dv), contiguous, or grads,
        filled: three tensors of the shape of q with a unit last stride; dout may have any strides. saved is (out,
        stats) of the forward where stats_size(...) > 0, else None
    why_not(device_type, dtype, head_dim) -> None when the backend can run, else the reason in one line
    stats_size(shape of q, dtype, view) -> how many float32 numbers, a 1-D tensor laid out as the backend likes, the
        backward needs of the forward beside q, k, v and out: n clips have n times as many as one. The sizes of shape
        may be symbolic, but for head_dim. None: never any
    auto_skips: device types on which `auto` passes over the backend although it can run there when named
    """

    name: str
    forward: Callable
    backward: Callable
    why_not: Callable[[str, torch.dtype, int], str | None]
    stats_size: Callable[[torch.Size, torch.dtype, View], int] | None = None
    auto_skips: frozenset[str] = frozenset()


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Append a backend to the list; `auto` tries them in this order."""
    _BACKENDS[backend.name] = backend
    resolve.cache_clear()


def available_backends() -> tuple[str, ...]:
    """Names of all backends, in the order in which `auto` tries them."""
    return tuple(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown one."""
    if name not in _BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def resolve(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, view: View | None = None
) -> Backend:
    """The backend that serves a call. A named one, or RuntimeError with its reason. For "auto" the one that the rules
    name for such a GPU and such sequences; where it cannot run, or there is no rule, the first of the list that can.

    view: its sizes may be symbolic, and are looked at only where they decide. None asks for the shortest sequences.
    """
    rungs = _rungs(name, device, dtype, head_dim)
    if len(rungs) == 1 or view is None:
        return rungs[0][1]
    members = view.members
    for most, backend in rungs:  # not next(), which takes three times as long
        if most is None or members <= most:
            return backend
    raise AssertionError("the last rung has an end")


@lru_cache(maxsize=1024)
def _rungs(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple:
    """((most members of a sequence, the backend that serves up to there), ...), ascending; the last has no most."""
    device = torch.device(device)
    if name == "auto":
        rungs = []
        for most, _, backend in _choices(device, dtype, head_dim):
            if rungs and rungs[-1][1] is backend:
                rungs.pop()
            rungs.append((most, backend))
        return tuple(rungs)
    backend = get(name)
    if reason := backend.why_not(device.type, dtype, head_dim):
        raise RuntimeError(
            f"backend {name!r} cannot run: {reason}; `python -m timesformer_kernels.info` shows what can"
        )
    return ((None, backend),)


resolve.cache_clear = _rungs.cache_clear  # for those who change what a backend can do


def _choices(device: torch.device, dtype: torch.dtype, head_dim: int) -> list:
    """[(most members, the rule that decides or None, the backend that `auto` takes)], ascending."""
    able = [  # the reference, last in the list, runs anywhere
        b
        for b in _BACKENDS.values()
        if device.type not in b.auto_skips and b.why_not(device.type, dtype, head_dim) is None
    ]
    architecture = choice.architecture(device)
    rules = () if architecture is None else choice.rules()
    fitting = choice.fitting(rules, architecture, dtype, head_dim)
    return [
        (most, rule, next((b for b in able if rule is not None and b.name == rule.backend), able[0]))
        for most, rule in choice.spans(fitting)
    ]


def verdict(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """What becomes of a backend on such tensors, in one line: "can run", with a condition, or why not."""
    backend = get(name)
    if reason := backend.why_not(device_type, dtype, head_dim):
        return reason
    return "can run" + (", but auto passes over it: name it" if device_type in backend.auto_skips else "")


def taken(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """What `auto` takes: "cpp", or "cuda up to 16 members, triton"."""
    rungs = _rungs("auto", device, dtype, head_dim)
    return ", ".join(b.name if most is None else f"{b.name} up to {most} members" for most, b in rungs)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scheme: str | Scheme | None = None,
    frames: int | None = None,
    grid: tuple[int, int, int] | None = None,
    cls: str | None = None,
) -> str:
    """Why each backend can or cannot run on such q, k, v, and which of them "auto" takes, by what rule and reason.

    scheme: attention along "time" or over "space", with frames as in `time_attention`, or any with grid as in
        `grid_attention`; without one the answer speaks of sequences of every length.
    cls: as there; by default "exclude" for time, else "per_group".
    Returns one line per backend, in the order of the list, then at least one for "auto".
    Raises TypeError and ValueError for bad arguments.
    """
    check_qkv(q, k, v)
    view = None
    if scheme is not None:
        cls = cls or ("exclude" if scheme == "time" else "per_group")
        if (frames is None) == (grid is None):
            raise ValueError(f"frames, grid: got {frames} and {grid}, expected one of them with scheme={scheme!r}")
        if grid is not None:
            view = make_view(scheme, grid, cls)
            check_grid(q.shape[1], grid, cls)
        elif scheme in ("time", "space"):
            view = view_of_frames(scheme, q.shape[1], frames, cls, "space_major")
        else:
            raise ValueError(f"grid: missing, expected (height, width, frames) with scheme={scheme!r}")
    elif frames is not None or grid is not None or cls is not None:
        raise ValueError('scheme: missing, expected one with frames, grid or cls, such as "time"')
    return _table(q.device, q.dtype, int(q.shape[3]), view)


def _table(device: torch.device, dtype: torch.dtype, head_dim: int, view: View | None = None) -> str:
    """A line for each backend, its name and its verdict; then what `auto` takes for a view, or for every length, and
    why."""
    lines = [(name, verdict(name, device.type, dtype, head_dim)) for name in _BACKENDS]
    first = 0
    for most, rule, backend in _choices(device, dtype, head_dim):
        if view is None or (first <= view.members and (most is None or view.members <= most)):
            lengths = (first, most) if view is None else (view.members, view.members)
            lines.append(("auto", _reason(lengths, rule, backend, device.type, dtype, head_dim)))
        first = None if most is None else most + 1
    return "\n".join(f"{name:>10}: {text}" for name, text in lines)


def _reason(lengths, rule: choice.Rule | None, backend: Backend, device_type: str, dtype, head_dim: int) -> str:
    """Why `auto` takes the backend."""
    if rule is None:
        return f"takes {backend.name}, the first that can run"
    text = f"takes {backend.name} for sequences of {choice.span(lengths)} members"
    if backend.name == rule.backend:
        return f"{text}; {choice.why(rule)}"
    refusal = verdict(rule.backend, device_type, dtype, head_dim)
    return f"{text}, the first that can run; the rule is {rule.backend}, {choice.why(rule)}; it cannot run: {refusal}"
