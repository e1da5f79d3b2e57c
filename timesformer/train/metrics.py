# SPDX-License-Identifier: Apache-2.0
"""Numbers of a training: one JSON object a line, and TensorBoard where that is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .checkpoint import truncate

NAME = "metrics.jsonl"
EVENTS = "tensorboard"


def _writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / EVENTS), purge_step=step)


class Metrics:
    """Appends to FOLDER/metrics.jsonl. `size` of a checkpoint and the lines behind it are gone after a resume."""

    def __init__(self, folder: Path, *, size: int = 0, step: int = 0):
        self.path = folder / NAME
        truncate(self.path, size)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board, self.failed = _writer(folder, step), False

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line {"step": step, ...}; numbers go to TensorBoard by their names, nested ones as "val/top1"."""
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            self.failed = True
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error
        if self.board:
            for name, value in _numbers(values):
                self.board.add_scalar(name, value, step)

    def size(self) -> int:
        """Bytes written so far, on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """What `write` has failed to write fails once more here, and was said."""
        for part in (self.file, self.board):
            try:
                if part:
                    part.close()
            except OSError:
                if not self.failed:
                    raise


def _numbers(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
