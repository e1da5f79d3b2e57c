# SPDX-License-Identifier: Apache-2.0
"""Accuracy on folders val/<class>/*.mp4, several views a video, decoded by two processes ahead of the model.

    pip install "timesformer-kernels[all]"
    python examples/evaluate_folder.py DATA_DIR [MODEL]

The same numbers as `timesformer evaluate DATA_DIR --model MODEL`.
"""

import sys
from dataclasses import replace

from timesformer import TimeSformer
from timesformer.evaluation import aggregate, predict
from timesformer.presets import find_preset
from timesformer.train.folders import read_folder, relabel
from timesformer.video.loading import load_views


def main(data: str, source: str = "facebook/timesformer-base-finetuned-k400") -> None:
    model = TimeSformer.from_pretrained(source).fuse()
    config = model.config
    preset = replace(find_preset(config.preset or "k400-base"), img_size=config.img_size, num_frames=config.num_frames)
    folder = relabel(read_folder(data, "val"), config.id2label, config.num_classes, data)
    paths, labels = zip(*folder.clips, strict=True)
    right = read = 0
    for video, label in zip(load_views(paths, preset, workers=2), labels, strict=True):
        if video.error:
            print(f"skipped: {video.error}", file=sys.stderr)
            continue
        probabilities = aggregate(predict(model, video.views))  # of all clips and crops
        right, read = right + (probabilities.argmax().item() == label), read + 1
    print(f"{right} of {read} videos right, {len(paths) - read} skipped")


if __name__ == "__main__":
    main(*sys.argv[1:])
