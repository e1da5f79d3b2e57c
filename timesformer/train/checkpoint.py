# SPDX-License-Identifier: Apache-2.0
"""The state of a training in one file, which is whole under its name at every moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import remove_leftovers, whole

NAME = "checkpoint.pt"
FORMAT = 1


class ResumeError(ValueError):
    """A checkpoint that cannot be gone on with: damaged, or of another training."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state under another name, flush it to the disk, then rename it.

    Raises OSError, with the old file untouched and nothing new left over, where the disk is full.
    """
    remove_leftovers(path)  # of a process that was killed here
    try:
        with whole(path) as part, open(part, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
    except OSError as error:
        kept = "; the checkpoint before it is kept" if path.exists() else ""
        raise OSError(f"{error}{kept}") from error


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote. Raises ResumeError for a file that is missing, damaged or of another kind."""
    if not path.is_file():
        raise ResumeError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ResumeError(f"--resume: {path} is damaged or not a checkpoint of a training ({_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ResumeError(f"--resume: {path} is not a checkpoint of a training")
    return state


def check(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ResumeError listing everything in which the training that was saved differs from the one asked for.

    Both are dicts of dicts, such as {"recipe": {"lr": 0.005}}.
    """
    lines = []
    for part, values in asked.items():
        old = saved.get(part, {})
        for name in dict.fromkeys((*old, *values)):
            if old.get(name) != values.get(name):
                lines.append(f"{part} {name} is {_short(old.get(name))} there, {_short(values.get(name))} here")
    if lines:
        raise ResumeError(f"--resume: {path} is of another training: {'; '.join(lines)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def truncate(path: Path, size: int) -> None:
    """Cut a file of lines back to what it held when a checkpoint was written."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
