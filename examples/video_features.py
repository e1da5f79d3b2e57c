# SPDX-License-Identifier: Apache-2.0
"""Clip features and class scores of a video file, with the paper's three crops.

    pip install "timesformer-kernels[all]"
    python examples/video_features.py VIDEO [MODEL]

MODEL is a hub id, a folder or a file of any known format. The default, and every released model, is CC-BY-NC 4.0.
"""

import sys
from dataclasses import replace

import torch

from timesformer import TimeSformer
from timesformer.presets import find_preset
from timesformer.video import clip_views


def main(video: str, source: str = "facebook/timesformer-base-finetuned-k400") -> None:
    model = TimeSformer.from_pretrained(source)
    config = model.config
    preset = replace(find_preset(config.preset or "k400-base"), img_size=config.img_size, num_frames=config.num_frames)
    views = clip_views(video, preset)  # [3 crops, 3, T, H, W]
    with torch.inference_mode():
        features = model.forward_features(views)  # [3, dim]
        logits = model.head(features).sum(0)  # the original adds the crops' logits
    print(f"features {tuple(features.shape)}, norm {features.norm():.4g}")
    for score, index in zip(*(x.tolist() for x in logits.topk(min(5, len(logits)))), strict=True):
        print(f"{score:8.3f}  {(config.id2label or {}).get(index, f'class {index}')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
