# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: one ordered list, and a reason from each backend that cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from .grid import View


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


@lru_cache(maxsize=1024)
def resolve(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend that serves a call: for "auto" the first that can; a named one, or RuntimeError with its reason."""
    if name == "auto":  # the reference, last in the list, runs anywhere
        return next(
            b
            for b in _BACKENDS.values()
            if device_type not in b.auto_skips and b.why_not(device_type, dtype, head_dim) is None
        )
    backend = get(name)
    if reason := backend.why_not(device_type, dtype, head_dim):
        raise RuntimeError(
            f"backend {name!r} cannot run: {reason}; `python -m timesformer_kernels.info` shows what can"
        )
    return backend


def verdict(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """What becomes of a backend on such tensors, in one line: "can run", with a condition, or why not."""
    backend = get(name)
    if reason := backend.why_not(device_type, dtype, head_dim):
        return reason
    return "can run" + (", but auto passes over it: name it" if device_type in backend.auto_skips else "")


def table(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """One line per backend: its name and its verdict."""
    return "\n".join(f"{name:>10}: {verdict(name, device_type, dtype, head_dim)}" for name in _BACKENDS)
