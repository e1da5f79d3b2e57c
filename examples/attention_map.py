# SPDX-License-Identifier: Apache-2.0
"""What reaches the class token of a clip through all layers, drawn over its frames into one picture.

pip install "timesformer-kernels[all]"
python examples/attention_map.py VIDEO PICTURE.png [MODEL]
"""

import sys
from dataclasses import replace

import torch

from timesformer import TimeSformer
from timesformer.maps import rollout
from timesformer.overlay import overlay, sheet, write_png
from timesformer.presets import find_preset
from timesformer.video import clip_views


def main(video: str, picture: str, source: str = "facebook/timesformer-base-finetuned-k400") -> None:
    model = TimeSformer.from_pretrained(source)
    config = model.config
    preset = find_preset(config.preset or "k400-base")
    preset = replace(preset, img_size=config.img_size, num_frames=config.num_frames, clips=1, crops=1)
    views = clip_views(video, preset)  # [1, 3, T, H, W]
    with torch.inference_mode():
        share = rollout(model, views)[0]  # [T, h, w], of the class token in the last layer
    mean, std = (torch.tensor(values) for values in (preset.mean, preset.std))
    frames = ((views[0].movedim(0, -1) * std + mean) * 255).round().clamp(0, 255).byte().numpy()  # [T, H, W, 3]
    write_png(picture, sheet(frames, overlay(frames, share)))
    print(f"{picture}: {len(frames)} frames, most of it from frame {share.sum((1, 2)).argmax()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
