# SPDX-License-Identifier: Apache-2.0
"""Small Hugging Face models, clips for them, and what a call of one gives."""

import torch
import transformers

FRAMES, CLASSES = 4, 7


def make(kind="divided_space_time", seed=0, **options):
    """A small model with nothing at its initial zeros."""
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    config = transformers.TimesformerConfig(
        **sizes, image_size=32, patch_size=8, num_frames=FRAMES, attention_type=kind, num_labels=CLASSES
    )
    vars(config).update(options)  # not checked: transformers 5 declares the rate of stochastic depth an integer
    model = transformers.TimesformerForVideoClassification(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def clip(frames=FRAMES, batch=2, size=32):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, 3, size, size, generator=generator, dtype=torch.float64)


def run(model, video, **options):
    """Logits and the gradient of every parameter and of the video."""
    model.zero_grad()
    video = video.clone().requires_grad_()
    logits = model(video, **options).logits
    logits.square().sum().backward()
    return {"logits": logits.detach(), "video": video.grad} | {n: p.grad for n, p in model.named_parameters()}


def assert_same(got, expected, limit=1e-11):
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        scale = exact.abs().max()
        assert scale > 0, name
        assert (got[name] - exact).abs().max() <= limit * scale, name
