# SPDX-License-Identifier: Apache-2.0
"""Memory that tells: NaN in fresh tensors, and tensors carved out of a guarded, NaN-filled buffer."""

from contextlib import contextmanager

import torch
from torch.utils._device import _device_constructors

# Cached now: it must hold torch's own functions, or `with torch.device(...)` would miss the patched ones.
_device_constructors()

GUARD = 4096  # bytes before and after every tensor
REAL = {
    "empty": torch.empty,
    "empty_like": torch.empty_like,
    "empty_strided": torch.empty_strided,
    "new_empty": torch.Tensor.new_empty,
}


class Arena:
    """A buffer filled with 0xFF, which is NaN in every float type; tensors lie between guards of the same."""

    def __init__(self, nbytes=1 << 24, device="cpu"):
        self.buffer = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device)
        self.offset, self.live = GUARD, []

    def take(self, *shape, dtype=torch.float32, align=64, skew=0):
        """A NaN-filled tensor; skew (bytes, a multiple of the item size) misaligns it on purpose."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.offset = -(-self.offset // align) * align + skew
        assert self.offset + nbytes + GUARD <= self.buffer.numel(), "arena too small for this test"
        tensor = self.buffer[self.offset : self.offset + nbytes].view(dtype).view(shape)
        self.live.append((self.offset, nbytes))
        self.offset += nbytes + GUARD
        return tensor

    def put(self, values, **where):
        """A contiguous copy of `values` inside the arena."""
        return self.take(*values.shape, dtype=values.dtype, **where).copy_(values)

    def damage(self):
        """Offsets of the first guard bytes that changed; [] when all is well."""
        guards = torch.ones_like(self.buffer, dtype=torch.bool)
        for offset, nbytes in self.live:
            guards[offset : offset + nbytes] = False
        return ((self.buffer != 0xFF) & guards).nonzero().flatten()[:4].tolist()


def _poison(tensor):
    with torch.no_grad():  # a leaf that requires grad may be asked for
        if tensor.dtype == torch.uint8:
            return tensor.fill_(0xFF)  # a workspace: NaN whatever it will hold
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@contextmanager
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that a kernel which skips a row fails loudly."""
    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, lambda *a, _real=REAL[name], **kw: _poison(_real(*a, **kw)))
        patch.setattr(torch.Tensor, "new_empty", lambda x, *a, **kw: _poison(REAL["new_empty"](x, *a, **kw)))
        yield


@contextmanager
def unpoisoned(monkeypatch):
    """Without the patches of `poisoned`, which the compiler must not trace."""
    with monkeypatch.context() as patch:
        patch.delattr(torch.Tensor, "new_empty")
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, REAL[name])
        yield


@contextmanager
def carved(monkeypatch, arena):
    """Fresh float and byte memory on the arena's device is taken from it: outputs and workspaces get guards, too."""

    def take(real):
        def allocate(*args, **kwargs):
            like = real(*args, **{**kwargs, "device": "meta"})
            where = torch.device(kwargs.get("device") or getattr(args[0], "device", "cpu"))
            ours = where.type == arena.buffer.device.type and (like.is_floating_point() or like.dtype == torch.uint8)
            if not ours or not like.is_contiguous():
                return real(*args, **kwargs)
            return arena.take(*like.shape, dtype=like.dtype)

        return allocate

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, take(REAL[name]))
        patch.setattr(torch.Tensor, "new_empty", take(REAL["new_empty"]))
        yield
