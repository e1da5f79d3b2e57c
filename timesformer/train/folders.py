# SPDX-License-Identifier: Apache-2.0
"""Labelled videos in folders: DATA_DIR/train/<class>/*.mp4 and DATA_DIR/val/<class>/*.mp4."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")


@dataclass(frozen=True)
class Folder:
    """classes: names in alphabetical order. clips: (path, index of its class), by class and name."""

    classes: tuple[str, ...]
    clips: tuple[tuple[str, int], ...]


def video_files(folder: str | os.PathLike) -> list[str]:
    """The video files below a folder, by suffix, in alphabetical order. Hidden files and folders are left out."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(root, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(found)


def has_split(data_dir: str | os.PathLike, split: str) -> bool:
    """True where DATA_DIR/<split> is a folder."""
    return (Path(data_dir) / split).is_dir()


def read_folder(data_dir: str | os.PathLike, split: str) -> Folder:
    """The classes and videos of DATA_DIR/<split>.

    Raises ValueError, naming the folder, where it is missing, has no class, or where a class has no video.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        kind = "is a file, expected a folder" if data_dir.exists() else "no such folder"
        raise ValueError(f"DATA_DIR {str(data_dir)!r}: {kind}")
    root = data_dir / split
    if not root.is_dir():
        raise ValueError(f"DATA_DIR {str(data_dir)!r}: has no folder {split!r}; expected {split}/<class>/*.mp4")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{str(root)!r}: has no class; expected a folder for each, {split}/<class>/*.mp4")
    files = [video_files(root / name) for name in classes]
    if empty := [name for name, paths in zip(classes, files, strict=True) if not paths]:
        raise ValueError(
            f"{str(root)!r}: no video in the class folder{'s' * (len(empty) > 1)} {', '.join(map(repr, empty))} "
            f"(looked for {', '.join('*' + suffix for suffix in SUFFIXES[:5])}, ...)"
        )
    return Folder(tuple(classes), tuple((path, label) for label, paths in enumerate(files) for path in paths))


def relabel(folder: Folder, names: dict[int, str] | None, num_classes: int, where: str) -> Folder:
    """The folder with the class numbers of a model whose classes are `names`.

    Raises ValueError where a class of the folder is none of the model's, or where the model does not name its classes
    and has another number of them.
    """
    if not names:
        if len(folder.classes) != num_classes:
            raise ValueError(
                f"{where}: {len(folder.classes)} class folders, but the model has {num_classes} classes without names"
            )
        return folder
    numbers = {name: number for number, name in names.items()}
    if unknown := [name for name in folder.classes if name not in numbers]:
        raise ValueError(
            f"{where}: {', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} not among the model's "
            f"{len(names)} classes ({', '.join(list(numbers)[:8])}{', ...' if len(names) > 8 else ''})"
        )
    clips = tuple((path, numbers[folder.classes[label]]) for path, label in folder.clips)
    return Folder(tuple(names[number] for number in sorted(names)), clips)
