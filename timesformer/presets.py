# SPDX-License-Identifier: Apache-2.0
"""The released TimeSformer recipes as data: clip size, frame sampling and preprocessing by name.

Sizes, rates, statistics and the three-crop test protocol follow the TimeSformer paper (arXiv 2102.05095, sections 4
and 4.5) and the settings published with the released models.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("timesformer")

SAMPLERS = ("kinetics", "segments", "uniform")
PREPROCESSOR = "preprocessor_config.json"  # Hugging Face's name


@dataclass(frozen=True)
class Preset:
    """One recipe. `dataclasses.replace` makes variants of it.

    img_size: pixels, square. num_frames: frames of one clip. rate: frames apart at 30 frames per second, for the
    "kinetics" sampler; None for the samplers that cover the whole video. mean, std: by channel, of pixels in [0, 1].
    crops, clips: test views are clips * crops. train_scale: range of the random short side in pixels.
    """

    name: str
    img_size: int
    num_frames: int
    sampler: str
    rate: int | None
    num_classes: int
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    channel_order: str = "RGB"
    crops: int = 3
    clips: int = 1
    attention_type: str = "divided_space_time"
    train_scale: tuple[int, int] = (256, 320)
    train_inverse_scale: bool = False
    train_flip: float = 0.5

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if self.sampler == "kinetics" and (self.rate is None or self.rate <= 0):
            raise ValueError(f"rate: got {self.rate}, expected a positive number for the kinetics sampler")
        for name in ("img_size", "num_frames", "num_classes", "clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.clips > 1 and self.sampler != "kinetics":
            raise ValueError(f"clips: got {self.clips}, expected 1: {self.sampler} sampling covers the whole video")
        if self.crops not in (1, 3):
            raise ValueError(f"crops: got {self.crops}, expected 1 or 3")


def _kinetics(dataset: str, num_classes: int) -> list[Preset]:
    return [
        Preset(f"{dataset}-base", 224, 8, "kinetics", 32, num_classes),
        Preset(f"{dataset}-hr", 448, 16, "kinetics", 16, num_classes, train_scale=(448, 512)),
        Preset(f"{dataset}-large", 224, 96, "kinetics", 4, num_classes),
    ]


def _ssv2() -> list[Preset]:
    # BGR: the original's reader of Something-Something never swaps OpenCV's channels, so its weights expect them so.
    # No flip: the classes tell left from right.
    common = {"channel_order": "BGR", "train_inverse_scale": True, "train_flip": 0.0}
    return [
        Preset("ssv2-base", 224, 8, "segments", None, 174, **common),
        Preset("ssv2-hr", 448, 16, "segments", None, 174, **common, train_scale=(448, 512)),
        Preset("ssv2-large", 224, 64, "segments", None, 174, **common),
    ]


def _howto100m() -> list[Preset]:
    # the number of clips that covers an average video: longer clips need fewer
    return [
        Preset(f"howto100m-{frames}", 224, frames, "kinetics", 32, 1059, clips=clips)
        for frames, clips in ((8, 48), (32, 12), (64, 6), (96, 4))
    ]


# Drawn clips, see timesformer.train.tasks: the classes tell left from right, so no flip.
_MINIATURE = Preset("miniature", 32, 8, "uniform", None, 28, crops=1, train_scale=(32, 32), train_flip=0.0)

PRESETS = {
    preset.name: preset
    for preset in (*_kinetics("k400", 400), *_kinetics("k600", 600), *_ssv2(), *_howto100m(), _MINIATURE)
}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError listing the valid names."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of_checkpoint(name: str) -> Preset | None:
    """The preset meant by a hub id such as "facebook/timesformer-hr-finetuned-ssv2", or None."""
    match = re.search(r"timesformer-(base|hr|large)-finetuned-(k400|k600|ssv2)$", name)
    return PRESETS[f"{match[2]}-{match[1]}"] if match else None


def checkpoint_statistics(source) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that a Hugging Face folder or hub repository states for its pixels, or None where it states none.

    Releases and fine-tuned models differ here, so what the checkpoint says is worth more than any default.
    Raises ValueError for a file that cannot be understood.
    """
    path = Path(source).expanduser()
    if path.exists():
        file = path / PREPROCESSOR if path.is_dir() else None
    else:
        from huggingface_hub import hf_hub_download  # the model itself came from the hub, so it is installed

        try:
            file = Path(hf_hub_download(os.fspath(source), PREPROCESSOR))
        except OSError:  # the repository has no such file, or offline it is not in the cache
            logger.warning("%s: no %s can be read; the preset's mean and std are used", source, PREPROCESSOR)
            return None
    if file is None or not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        mean, std = (tuple(float(x) for x in values[name]) for name in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected JSON with image_mean and image_std, three numbers each") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{file}: got image_mean {mean} and image_std {std}, expected three numbers each, std above 0")
    return mean, std
