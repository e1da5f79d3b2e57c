# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face TimeSformer on our kernels: one line, the same logits, and how long both take here."""

import time

import torch
from transformers import TimesformerConfig, TimesformerForVideoClassification

from timesformer.integrations import accelerate_transformers


def timed(model: torch.nn.Module, video: torch.Tensor) -> tuple[torch.Tensor, float]:
    model(video)  # warm
    start = time.perf_counter()
    logits = model(video).logits
    return logits, time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    config = TimesformerConfig(image_size=112, num_hidden_layers=2, num_frames=8)  # use from_pretrained(...) instead
    model, video = TimesformerForVideoClassification(config).eval(), torch.randn(1, 8, 3, 112, 112)
    with torch.no_grad():
        before, slow = timed(model, video)
        after, fast = timed(accelerate_transformers(model), video)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(f"{1e3 * slow:.0f} ms, accelerated {1e3 * fast:.0f} ms; logits differ by {difference:.1e} of their scale")


if __name__ == "__main__":
    main()
