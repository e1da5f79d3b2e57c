# SPDX-License-Identifier: Apache-2.0
"""A TimeSformer as a file that runs without its Python code: torch.export and ONNX."""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .files import whole
from .layers import pair

if TYPE_CHECKING:
    from .model import TimeSformer

OPSET = 20  # the first ONNX operator set with GELU; LayerNormalization is there since 17
INPUT, OUTPUT = "video", "logits"
_ONNX_LIMIT = 2**31  # bytes of a file


def export_program(
    model: TimeSformer,
    *,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    backend: str = "reference",
) -> torch.export.ExportedProgram:
    """torch.export of the model in evaluation mode: video [batch, C, T, height, width] -> logits; any batch, one size.

    frames, size: T, and height and width in pixels; those of the configuration by default. backend: "reference" leaves
    PyTorch's own operators alone in the program, which any PyTorch then runs; another one, or "auto", leaves calls of
    this package's fused operators, and whoever loads the program must `import timesformer_kernels` first.
    The model itself is not changed. Raises ValueError for sizes that do not fit.
    """
    config = model.config
    height, width = pair(config.img_size if size is None else size)
    frames = config.num_frames if frames is None else frames
    weight = model.patch_embed.proj.weight
    # Two clips: a batch of one would be taken for a constant.
    video = weight.new_zeros(2, config.in_chans, frames, height, width)
    model._check(video)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_backend(backend)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (video,), dynamic_shapes={INPUT: {0: batch}}, strict=False)


def export_pt2(model: TimeSformer, path: str | os.PathLike, **options) -> None:
    """Write `export_program(model, **options)` for `torch.export.load`. The file appears whole or not at all."""
    program = export_program(model, **options)
    buffer = io.BytesIO()  # torch ends the process where it cannot write a file
    torch.export.save(program, buffer)
    with whole(Path(path)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def export_onnx(model: TimeSformer, path: str | os.PathLike, **options) -> None:
    """Write the model as an ONNX file of operator set 20: input "video", output "logits", any number of clips.

    options: frames and size of `export_program`. Standard operators only, float32, float64 or float16 as the model
    is. The file appears whole or not at all; a model of more than 2 GB, the limit of the format, is refused.
    Needs the packages of the extra "export". Raises ImportError without them, ValueError for what does not fit.
    """
    _onnx()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if weights >= _ONNX_LIMIT:
        raise ValueError(f"model: got {weights:,} bytes of weights, expected less than an ONNX file's {_ONNX_LIMIT:,}")
    program = export_program(model, **options, backend="reference")
    with _quiet():
        onnx = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    with whole(Path(path)) as temporary:
        onnx.save(temporary, external_data=False)


def _onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX export needs more packages: pip install "timesformer-kernels[export]"') from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on packages that are not installed and on their own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
