# SPDX-License-Identifier: Apache-2.0
"""Exported programs give the model's logits for any number of clips, here and in ONNX Runtime."""

import subprocess
import sys
from pathlib import Path

import blocks
import pytest
import torch
from blocks import TINY, clip

from timesformer import TimeSformer, export
from timesformer.export import export_onnx, export_program, export_pt2

KINDS = {"divided_space_time": 2, "joint_space_time": 1, "space_only": 1}  # with the depth that is tried


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(generator, kind="divided_space_time", **options):
    model = TimeSformer(**{**TINY, "attention_type": kind, **options})
    return blocks.randomise(model, generator).eval()


def batches(generator, **sizes):
    """Clips one at a time, as many as the exporter saw, and more."""
    return [clip(generator, batch=batch, dtype=torch.float32, **sizes) for batch in (1, 2, 5)]


def check(run, model, videos):
    for video in videos:
        with torch.no_grad():
            exact = model(video)
        torch.testing.assert_close(run(video), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_program_of_plain_operators(generator, kind):
    model = make(generator, kind, depth=KINDS[kind])
    program = export_program(model)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("timesformer_kernels" in name for name in names)
    check(program.module(), model, batches(generator))
    assert model.backend == "auto" and all(p.requires_grad for p in model.parameters())


def test_program_of_fused_operators(generator, tmp_path):
    """Saved, and loaded where only the kernels are imported."""
    model = make(generator)
    export_pt2(model, tmp_path / "model.pt2", backend="auto")
    program = torch.export.load(tmp_path / "model.pt2")
    assert any("timesformer_kernels.attn_fwd" in str(node.target) for node in program.graph.nodes)
    check(program.module(), model, batches(generator))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_file_runs_without_this_package(generator, tmp_path):
    model, (_, video, _) = make(generator), batches(generator)
    export_pt2(model, tmp_path / "model.pt2")
    torch.save(video, tmp_path / "video.pt")
    code = (
        "import sys, torch; video = torch.load('video.pt'); logits = torch.export.load('model.pt2').module()(video);"
        "assert not any(name.startswith('timesformer') for name in sys.modules); torch.save(logits, 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    logits = torch.load(tmp_path / "logits.pt")
    check(lambda _: logits, model, [video])


def test_other_sizes(generator):
    """The tables are resized at export."""
    model = make(generator)
    check(
        export_program(model, frames=3, size=(24, 40)).module(),
        model,
        batches(generator, frames=3, height=24, width=40),
    )


def test_sizes_that_do_not_fit(generator):
    with pytest.raises(ValueError, match="video: got shape .* height a multiple of 8"):
        export_program(make(generator), size=30)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_run(source):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return lambda video: torch.from_numpy(session.run(["logits"], {"video": video.numpy()})[0])


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_agrees(generator, tmp_path, kind):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = make(generator, kind, depth=KINDS[kind])
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    stored = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(stored, full_check=True)
    assert [(entry.domain, entry.version) for entry in stored.opset_import] == [("", 20)]  # standard operators alone
    assert not stored.functions
    check(onnx_run(str(tmp_path / "model.onnx")), model, batches(generator))


def test_missing_packages_are_named(generator, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "timesformer-kernels\[export\]"'):
        export_onnx(make(generator), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_too_large_for_onnx(generator, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "_ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="bytes of weights, expected less than an ONNX file's 1,000"):
        export_onnx(make(generator), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_failing_half_way_leaves_nothing(generator, tmp_path, monkeypatch):
    """The disk fills while the file is written: the old file stays, and no part of the new one."""
    (tmp_path / "model.pt2").write_bytes(b"old")

    def half(path, data):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="cannot write .*model.pt2: No space left"):
        export_pt2(make(generator), tmp_path / "model.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
