# SPDX-License-Identifier: Apache-2.0
"""The README's section on models, run as written; a checkpoint's name and the reader's own model are ours."""

import re
from pathlib import Path

import pytest
import torch

from timesformer import TimeSformer, demo

ROOT = Path(__file__).resolve().parents[1]
VIDEO = (1, 3, 8, 224, 224)


@pytest.fixture(scope="module")
def section():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## In your own model\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", found, re.MULTILINE | re.DOTALL)


def test_attention(section):
    names = {}
    exec(section[0], names)
    assert names["tokens"].shape == (2, 1569, 768) and names["tokens"].requires_grad
    assert names["out"].shape == (2, 1569, 12, 64)


def test_model(section):
    pytest.importorskip("safetensors")
    names = {"torch": torch}
    with torch.no_grad():
        exec(section[1].replace("path/to/checkpoint", str(demo.folder())), names)
    assert names["logits"].shape == (1, 400) and names["model"].head.out_features == 10


def test_hugging_face(section):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(image_size=32, patch_size=16, num_frames=4, hidden_size=32)
    config.update(dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    model = transformers.TimesformerModel(config).eval()
    video = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        stock = model(video).last_hidden_state
        exec(section[2], {"model": model})
        torch.testing.assert_close(model(video).last_hidden_state, stock, rtol=1e-4, atol=1e-5)


def test_session(section):
    names = {"torch": torch, "model": TimeSformer(depth=1), "video": torch.randn(VIDEO).bfloat16()}
    exec(section[3], names)
    assert names["logits"].shape == (1, 400) and not names["logits"].isnan().any()


def test_no_block_is_left_out(section):
    assert len(section) == 4
