# SPDX-License-Identifier: Apache-2.0
"""The README's first section: its commands on trained models as written, from a hub and a file that are ours."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from clips import make_video

from timesformer import TimeSformer
from timesformer.cli import main
from timesformer.weights import save_checkpoint, save_pretrained

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def section():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Try it\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return found


def test_classify(section, tmp_path, monkeypatch, capsys):
    """The clip, the model and the file that the lines name are there; the shell's part, *.mp4, is done here."""
    import huggingface_hub

    torch.manual_seed(0)
    small = TimeSformer(embed_dim=64, depth=1, num_heads=1).eval()  # 224 pixels, 8 frames, 400 classes
    save_pretrained(small, tmp_path / "hub", fmt="huggingface")
    asked = []

    def snapshot_download(repo, **options):
        asked.append(repo)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "hub" / name))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_video(folder / "clip.mp4", frames=40)
    make_video(folder / "another.mp4", frames=40)
    save_checkpoint(small, folder / "TimeSformer_divST_8x32_224_K400.pyth")
    (hub, file), outputs = re.findall(r"^timesformer classify .*$", section, re.MULTILINE), []
    for line in (hub, file):
        program, *argv = shlex.split(line)
        argv = [name for arg in argv for name in (sorted(p.name for p in folder.glob(arg)) if "*" in arg else [arg])]
        assert program == "timesformer" and main(argv) == 0, line
        outputs.append(capsys.readouterr().out)
    assert asked and set(asked) == {"facebook/timesformer-base-finetuned-k400"}
    assert len(outputs[0].splitlines()) == 1 + 5
    assert [result["video"] for result in json.loads(outputs[1])["results"]] == ["another.mp4", "clip.mp4"]


def test_the_marked_commands_are_what_continuous_integration_runs(section):
    marked = re.findall(r"^<!-- ci: (\w+) -->\n```bash\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in marked] == ["demo", "test"]
    assert all("\n" not in command for _, command in marked)  # it runs one line
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"$(readme {name})" in script for name, _ in marked)


def test_no_command_of_the_readme_is_unmarked():
    """Every block for a shell says who runs it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(.*)\n```bash\n", text, re.MULTILINE)
    assert len(blocks) >= 6
    for before in blocks:
        assert re.fullmatch(r"<!-- (ci: \w+|test: tests/\w+\.py runs these commands.*) -->", before), before
