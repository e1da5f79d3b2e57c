# SPDX-License-Identifier: Apache-2.0
"""A model made ready for inference on videos of known shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .folding import version_of
from .layers import hooked
from .model import TimeSformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NATIVE = {  # what a CPU reports that has instructions for products in the dtype
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}


def native(dtype: torch.dtype) -> bool:
    """True where this CPU has instructions for products in the dtype, rather than conversions around float32."""
    names, report = _NATIVE.get(dtype), getattr(torch.cpu, "get_capabilities", dict)
    return names is None or any(report().get(name) for name in names)


class Session:
    """logits = session(video), for videos of the shapes, the dtype and the device that the session holds.

        session = Session(model, [(1, 3, 8, 224, 224), (8, 3, 8, 224, 224)], dtype=torch.bfloat16)
        logits = session(video)

    model: a TimeSformer in evaluation mode; it is left as it is, and shares its parameters with the session where dtype
        is its own. What can be folded is (see `TimeSformer.fuse`; `not_folded` says why where nothing is).
    shapes: of videos, (batch, channels, frames, height, width). Each runs once here, so that later calls find kernels
        compiled. On a GPU each is captured as a CUDA graph with its own input and output memory; on a CPU calls are
        plain ones.
    dtype: of videos and logits, the model's by default. On a CPU without instructions for products in a 16-bit dtype
        they are computed in float32, from the same 16-bit weights: `compute_dtype` says which it is.

    One call at a time. A model whose weights have changed since, or another shape, dtype or device, raises ValueError
    or RuntimeError that says what the session holds. Out of memory is torch's own error, and model and session stay
    usable.
    """

    def __init__(self, model: TimeSformer, shapes: Iterable[Sequence[int]], *, dtype: torch.dtype | None = None):
        if not isinstance(model, TimeSformer):
            raise TypeError(f"model: got {type(model).__name__}, expected a TimeSformer")
        if model.training:
            raise ValueError("model: got one in training mode, expected model.eval()")
        weight = model.patch_embed.proj.weight
        self.dtype, self.device = weight.dtype if dtype is None else dtype, weight.device
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.shapes = tuple(dict.fromkeys(_shape(shape) for shape in shapes))
        if not self.shapes:
            raise ValueError("shapes: got none, expected at least one (batch, channels, frames, height, width)")
        slow = self.device.type == "cpu" and not native(self.dtype)
        self.compute_dtype = torch.float32 if slow else self.dtype
        graphs = self.device.type == "cuda"
        if graphs and hooked(model):
            raise ValueError("model: got one with hooks, which a CUDA graph would not call; remove them first")

        self._watched = [(p, version_of(p), p.data_ptr()) for p in model.parameters()]
        if {self.dtype, self.compute_dtype} == {weight.dtype}:
            self._model = copy.copy(model)  # the same parameters, unfused: what is folded is the session's own
        else:
            self._model = copy.deepcopy(model).to(self.dtype).to(self.compute_dtype)
        self.not_folded = None
        try:
            self._model.fuse()
        except RuntimeError as error:
            self.not_folded = str(error).removeprefix("fuse: ")

        self._graphs: dict[tuple[int, ...], _Graph] = {}
        pool = torch.cuda.graph_pool_handle() if graphs else None
        for shape in sorted(self.shapes, key=lambda s: -torch.Size(s).numel()):  # smaller ones fit what is there
            if graphs:
                self._graphs[shape] = _Graph(self._run, shape, self.dtype, self.device, pool)
            else:
                self._run(torch.zeros(shape, dtype=self.dtype))

    def _run(self, video: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model(video.to(self.compute_dtype)).to(self.dtype)

    def __call__(self, video: Tensor) -> Tensor:
        """video: [B, C, T, height, width] -> logits [B, num_classes], in memory of their own."""
        if not isinstance(video, Tensor):
            raise TypeError(f"video: got {type(video).__name__}, expected a torch.Tensor")
        if (video.dtype, video.device) != (self.dtype, self.device) or tuple(video.shape) not in self.shapes:
            raise ValueError(
                f"video: got shape {tuple(video.shape)}, {video.dtype} on {video.device}, this session holds "
                f"{', '.join(map(str, self.shapes))}, {self.dtype} on {self.device}"
            )
        # Moved or converted, a parameter is the same one of the same version, in other memory.
        if any(version_of(p) != version or p.data_ptr() != at for p, version, at in self._watched):
            raise RuntimeError("model: its weights have changed since this session was made; make a new one")
        graph = self._graphs.get(tuple(video.shape))
        return self._run(video) if graph is None else graph(video)


class _Graph:
    """One captured call, with the memory that it reads and writes."""

    def __init__(self, run, shape, dtype, device, pool):
        with torch.cuda.device(device):
            self.video = torch.zeros(shape, dtype=dtype, device=device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and chooses products' algorithms, which a capture cannot
                for _ in range(2):
                    run(self.video)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.logits = run(self.video)

    def __call__(self, video: Tensor) -> Tensor:
        self.video.copy_(video)
        self.graph.replay()
        return self.logits.clone()


def _shape(shape) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"shapes: got an element {shape!r}, expected a shape such as (1, 3, 8, 224, 224)")
    if len(shape) != 5 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"shapes: got {tuple(shape)}, expected five positive integers")
    return tuple(shape)
