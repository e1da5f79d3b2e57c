# SPDX-License-Identifier: Apache-2.0
"""Compile ahead of time: run a model once over each shape that it will meet, and leave it as it was.

Triton compiles a kernel at its first launch, which takes seconds and cannot happen while a CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


def warmup(model: nn.Module, shapes: Iterable[Sequence[int] | Tensor], *, train: bool = False) -> int:
    """Run `model` on an input of each shape, so that later calls find their kernels compiled.

    model: any module of one input. A surrounding `torch.autocast` holds for it. Its parameters, buffers, gradients and
        training mode, and the state of torch's random numbers, are the same afterwards.
    shapes: of inputs, (batch, 3, frames, height, width) for TimeSformer, or inputs themselves. A shape stands for zeros
        in the dtype and on the device of the model's first floating-point parameter. Kernels depend on dtype, head
        dimension, class mode and the length of the sequences, not on the batch.
    train: forward and backward in training mode; else the forward alone, in eval mode and without gradients.

    Returns how many Triton kernels were made ready here, compiled or read from Triton's cache on disk: 0 where none is
    launched or all were ready. Raises TypeError and ValueError for bad arguments, before anything runs, and whatever
    the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    trained = [p for p in model.parameters() if p.requires_grad]
    if train and not trained:
        raise ValueError("model: got no parameter that requires a gradient, expected one, or train=False")
    inputs = [x if isinstance(x, Tensor) else _shape(x) for x in _listed(shapes)]
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None and not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError("model: got no floating-point parameter to tell device and dtype, expected tensors as shapes")
    tensors = [*inputs, *model.parameters()]
    if any(x.device.type == "meta" for x in tensors if isinstance(x, Tensor)):
        raise ValueError("model, shapes: got tensors on device meta, where nothing is launched; move them first")
    devices = sorted({x.get_device() for x in tensors if isinstance(x, Tensor) and x.is_cuda})
    with _counted(bool(devices)) as ready, _unchanged(model), torch.random.fork_rng(devices):
        model.train(train)
        for x in inputs:
            x = x.detach() if isinstance(x, Tensor) else torch.zeros(x, dtype=like.dtype, device=like.device)
            with torch.set_grad_enabled(train):
                out = model(x)
                if train:
                    _differentiate(out, trained)
        for device in devices:
            torch.cuda.synchronize(device)  # what fails there fails here
    return len(ready)


def _listed(shapes) -> list:
    if isinstance(shapes, Tensor) or not isinstance(shapes, Iterable):
        raise TypeError(f"shapes: got {type(shapes).__name__}, expected an iterable of shapes or tensors")
    shapes = list(shapes)
    if not shapes:
        raise ValueError("shapes: got none, expected at least one")
    return shapes


def _shape(shape) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"shapes: got an element {shape!r}, expected a shape such as (1, 3, 8, 224, 224), or a tensor")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"shapes: got {tuple(shape)}, expected positive integers")
    return tuple(shape)


def _differentiate(out, parameters: list[Tensor]) -> None:
    """Gradients of all results, thrown away: nothing that waits for `.grad` sees them, an optimiser's hook, say."""
    results = [x for x in _tensors(out) if x.requires_grad]
    if not results:
        raise ValueError("model: got a result that depends on no parameter, expected a differentiable one")
    torch.autograd.grad(results, parameters, [torch.zeros_like(x) for x in results], allow_unused=True)


def _tensors(out) -> Iterator[Tensor]:
    """All tensors in a result: a tensor, or sequences and mappings of results."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        out = tuple(out.values())
    if isinstance(out, (tuple, list)):
        for x in out:
            yield from _tensors(x)


@contextlib.contextmanager
def _unchanged(model: nn.Module):
    """Training modes and buffers as they were, whatever happens inside."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                setattr(module, name, buffer)  # some put a new tensor in its place


@contextlib.contextmanager
def _counted(gpu: bool):
    """A list that grows by one for each kernel that Triton makes ready inside."""
    ready = []
    if not gpu and "triton" not in sys.modules:  # nothing on a CPU is worth the import
        yield ready
        return
    try:
        from triton import knobs
    except ImportError:  # without Triton no kernel of its
        yield ready
        return
    before = knobs.runtime.jit_post_compile_hook

    def count(**event):
        ready.append(event["repr"])
        return before(**event) if before is not None else None

    knobs.runtime.jit_post_compile_hook = count
    try:
        yield ready
    finally:
        knobs.runtime.jit_post_compile_hook = before
