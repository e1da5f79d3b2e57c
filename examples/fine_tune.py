# SPDX-License-Identifier: Apache-2.0
"""A trained model on your own classes, in a loop of your own: folders train/<class>/*.mp4 in, a model folder out.

    pip install "timesformer-kernels[all]"
    python examples/fine_tune.py DATA_DIR MODEL OUT [STEPS]

`timesformer train` does the same with schedule, mixed precision, validation, several processes and exact resume.
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from timesformer import TimeSformer
from timesformer.presets import find_preset
from timesformer.train import VideoClips, read_folder


def main(data: str, source: str, out: str, steps: str = "100") -> None:
    torch.manual_seed(0)
    folder = read_folder(data, "train")
    model = TimeSformer.from_pretrained(source, num_classes=len(folder.classes)).train()
    preset = find_preset(model.config.preset or "k400-base")
    preset = replace(preset, img_size=model.config.img_size, num_frames=model.config.num_frames)
    model.set_checkpoint("light")  # keeps 9 instead of 15 token tensors of a block for the backward
    clips = VideoClips(folder, preset)  # sampled, resized, cropped and flipped at random
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    for step in range(int(steps)):
        drawn = [clips.train(int(torch.randint(len(clips), ())), seed=1000 * step + i) for i in range(4)]
        videos, labels = torch.stack([clip for clip, _, _ in drawn]), torch.tensor([label for _, label, _ in drawn])
        loss = F.cross_entropy(model(videos), labels)  # videos [4, 3, T, H, W]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.config = replace(model.config, id2label=dict(enumerate(folder.classes)), preset=preset.name)
    model.save_pretrained(out)  # for `timesformer classify VIDEO --model OUT`


if __name__ == "__main__":
    main(*sys.argv[1:])
