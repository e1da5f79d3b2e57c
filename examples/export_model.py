# SPDX-License-Identifier: Apache-2.0
"""A model as an ONNX file, run by ONNX Runtime on two clips, beside the model itself.

pip install "timesformer-kernels[all,export]"
python examples/export_model.py MODEL FILE.onnx
"""

import sys

import torch

from timesformer import TimeSformer
from timesformer.export import export_onnx


def main(source: str, target: str) -> None:
    import onnxruntime

    model = TimeSformer.from_pretrained(source)
    config = model.config
    export_onnx(model, target)  # any number of clips, of this many frames and pixels
    video = torch.randn(2, 3, config.num_frames, config.img_size, config.img_size)
    (answer,) = onnxruntime.InferenceSession(target).run(None, {"video": video.numpy()})
    with torch.inference_mode():
        expected = model(video)
    difference = (torch.from_numpy(answer) - expected).abs().max() / expected.abs().max()
    print(f"{target}: logits {answer.shape}, differ by {difference.item():.1e} of their scale")


if __name__ == "__main__":
    main(*sys.argv[1:])
