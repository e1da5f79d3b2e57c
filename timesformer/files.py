# SPDX-License-Identifier: Apache-2.0
"""Writing files and folders: whole under their name, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `target` to write to; move it into place at the end, delete it after any failure.

    Raises OSError that names `target` and the system's reason where it cannot be written, whatever a writer made of it.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    if target.is_dir() != folder and target.exists():
        kind = "a file" if folder else "a folder"
        raise FileExistsError(f"cannot write {target}: it exists and is {kind}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        for path in sorted(temporary.iterdir()) if folder else [temporary]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # a name must not become visible before its content is on disk
        if folder and target.exists():
            # The weights first: an interruption between the two leaves a mismatch that reading detects and reports.
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)
        else:
            os.replace(temporary, target)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(f"cannot write {target}: {reason}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str | None:
    """Why the system refused a write. Torch wraps the error of its stream, safetensors prints it into its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if found := re.search(r"I/O error: (.*?) \(os error \d+\)", str(error)):
            return found[1]
        error = error.__cause__ or error.__context__
    return None


def remove_leftovers(target: Path) -> None:
    """Delete the temporary siblings that `whole(target)` left behind where its process was killed."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
