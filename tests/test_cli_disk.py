# SPDX-License-Identifier: Apache-2.0
"""Commands that find the disk full: one line that names the file and the system's reason, and only whole files.

A limit on the size of files stands in for the full disk. It stops the writers of torch, safetensors, ONNX, FFmpeg and
numpy where the system would, each with an error of its own making.
"""

import resource
from contextlib import contextmanager

import pytest

pytest.importorskip("av")
pytest.importorskip("safetensors")

from clips import call, make_video

from timesformer import demo

MODEL = str(demo.folder())
COMMANDS = [
    pytest.param("kept.mp4", ["demo", "--tiny", "--clip", "12", "--keep"], id="demo"),
    pytest.param("maps.png", ["attention", "VIDEO", "--model", "demo", "-o"], id="png"),
    pytest.param("maps.mp4", ["attention", "VIDEO", "--model", "demo", "-o"], id="mp4"),
    pytest.param("maps.npz", ["attention", "VIDEO", "--model", "demo", "--method", "space", "-o"], id="npz"),
    pytest.param("f.safetensors", ["features", "VIDEO", "--model", "demo", "--kind", "patch", "-o"], id="features"),
    pytest.param("model.safetensors", ["convert", MODEL], id="safetensors"),
    pytest.param("model.pyth", ["convert", MODEL], id="pyth"),
    pytest.param("folder", ["convert", MODEL], id="folder"),
    pytest.param("model.onnx", ["convert", MODEL], id="onnx"),
    pytest.param("model.pt2", ["convert", MODEL], id="pt2"),
]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("videos") / "clip.mp4")


@contextmanager
def room_for(size):
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("name, argv", COMMANDS)
def test_full_disk(capsys, tmp_path, video, name, argv, old):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxscript")
    if old and "." in name:
        (tmp_path / name).write_bytes(b"old")
    elif old:
        (tmp_path / name).mkdir()
    with room_for(4096):
        code, out, err = call(capsys, *[video if arg == "VIDEO" else arg for arg in argv], tmp_path / name)
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"timesformer {argv[0]}: error: cannot write ") and "File too large" in line, err
    assert str(tmp_path / name) in line and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ([name] if old else [])
    if old and "." in name:
        assert (tmp_path / name).read_bytes() == b"old"
    code, _, err = call(capsys, *[video if arg == "VIDEO" else arg for arg in argv], tmp_path / name)
    assert code == 0, err
