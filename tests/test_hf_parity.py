# SPDX-License-Identifier: Apache-2.0
"""The same random weights in Hugging Face's TimesformerForVideoClassification: logits and every gradient.

Its limits (sizes fixed by the config, space_only broken) leave divided and joint attention at the config's size; the
rest is compared with the independent model of blocks.py in test_model.py.
"""

import blocks
import pytest
import torch
from oracle import device_of, interpreted

from timesformer import TimeSformer
from timesformer.weights import to_native

pytestmark = pytest.mark.needs(dtype=torch.float64)  # what the tests of this file ask of a backend

transformers = pytest.importorskip("transformers")

SIZES = {  # image, patch, frames, dim, depth, heads, classes
    "tiny": (32, 8, 4, 32, 2, 4, 7),
    "mid": (96, 16, 8, 192, 3, 3, 11),  # 36 locations, head_dim 64 as in TimeSformer-B
}


@pytest.fixture(params=[(size, kind) for size in SIZES for kind in ("divided", "joint")], ids="-".join)
def pair(request):
    """(Hugging Face's model, ours, video [B, C, T, H, W]) in float64."""
    size, kind = request.param
    image, patch, frames, dim, depth, heads, classes = SIZES[size]
    kind = f"{kind}_space_time"
    config = transformers.TimesformerConfig(
        image_size=image,
        patch_size=patch,
        num_frames=frames,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        attention_type=kind,
        num_labels=classes,
    )
    generator = torch.Generator().manual_seed(0)
    theirs = blocks.randomise(transformers.TimesformerForVideoClassification(config).double(), generator).eval()
    sizes = dict(embed_dim=dim, depth=depth, num_heads=heads)
    ours = TimeSformer(image, patch, classes, frames, kind, **sizes).double().eval()
    ours.load_state_dict(to_native(theirs.state_dict(), "huggingface"))
    return theirs, ours, torch.randn(2, 3, frames, image, image, generator=generator, dtype=torch.float64)


def run(model, video, weight):
    """Logits, input gradient and parameter gradients; theirs by our names."""
    model.zero_grad()
    video = video.clone().requires_grad_()
    hugging = not isinstance(model, TimeSformer)
    logits = model(video.transpose(1, 2)).logits if hugging else model(video)
    (logits * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "video": video.grad, **(to_native(grads, "huggingface") if hugging else grads)}


@pytest.mark.parametrize("dtype, factor", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_and_gradients(backend, pair, dtype, factor):
    theirs, ours, video = pair
    if interpreted(backend) and ours.config.embed_dim > 32:
        pytest.skip("minutes in the interpreter")
    ours.set_backend(backend)
    theirs, ours, video = (x.to(device_of(backend), dtype) for x in (theirs, ours, video))
    weight = torch.randn(len(video), ours.config.num_classes, generator=torch.Generator().manual_seed(1)).to(video)
    expected, got = run(theirs, video, weight), run(ours, video, weight)
    assert expected.keys() == got.keys() and len(got) == 2 + len(ours.state_dict())
    for name, exact in expected.items():
        scale = exact.abs().max()
        assert scale > 1e-3, name  # no parameter is out of the game
        assert (got[name] - exact).abs().max() <= factor * scale, name


def test_no_grad_path(backend, pair):
    """Inference adds residuals in place; the logits are those of training to the last digits."""
    theirs, ours, video = pair
    ours.set_backend(backend)
    with torch.no_grad():
        exact = theirs(video.transpose(1, 2)).logits
        assert (ours(video) - exact).abs().max() <= 1e-11 * exact.abs().max()
