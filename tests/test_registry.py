# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, why not, and what a native library that is missing or broken does to it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import device_of, make_qkv

from timesformer_kernels import available_backends, explain, native, registry, time_attention

PACKAGE = Path(native.__file__).parent
CALL = """
import sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
import timesformer_kernels
from timesformer_kernels import explain, native, time_attention
assert timesformer_kernels.__file__.startswith(sys.argv[1]), timesformer_kernels.__file__
x = torch.randn(1, 9, 2, 8)
print(native.library()[1])
print(explain(x, x, x).replace("\\n", " | "))
plain = time_attention(x, x, x, frames=4, backend="reference")
print(torch.allclose(time_attention(x, x, x, frames=4), plain, atol=1e-5))
try:
    time_attention(x, x, x, frames=4, backend="cpp")
except RuntimeError as error:
    print(error)
"""


def test_order_and_names():
    names = available_backends()
    assert names == ("triton", "cuda", "cpp", "reference")
    assert all(registry.get(name).name == name for name in names)


def test_auto_takes_the_first_willing_backend(monkeypatch):
    def chosen():
        registry.resolve.cache_clear()
        return registry.resolve("auto", "cpu", torch.float32, 8).name

    able = [n for n in available_backends() if registry.get(n).why_not("cpu", torch.float32, 8) is None]
    willing = [n for n in able if "cpu" not in registry.get(n).auto_skips]
    try:
        for name in willing[:-1]:
            assert chosen() == name
            monkeypatch.setitem(registry._BACKENDS, name, replace(registry.get(name), why_not=lambda *a: "not today"))
        assert chosen() == "reference"
    finally:
        monkeypatch.undo()
        registry.resolve.cache_clear()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="backend: got 'cudnn', expected one of auto, .*cpp.*reference"):
        registry.get("cudnn")


def test_explain_has_one_line_per_backend_in_order_and_what_auto_takes():
    q, k, v = make_qkv(1, 9, 2, 8)
    lines = explain(q, k, v).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [*available_backends(), "auto"]
    assert "can run" in lines[-2]
    taken = registry.resolve("auto", "cpu", q.dtype, 8).name
    assert lines[-1].endswith(f"auto: takes {taken}, the first that can run")
    meta = explain(*(x.to("meta") for x in (q, k, v))).splitlines()
    assert "not on meta" in meta[available_backends().index("cpp")]


def test_explain_checks_its_arguments():
    with pytest.raises(ValueError, match="4 dimensions"):
        explain(*[torch.zeros(3, 4)] * 3)


def test_every_instruction_set_can_be_forced(isa):
    assert native.isa() == isa


def test_unknown_instruction_set():
    if not native.isas():
        pytest.skip(native.library()[1])
    with pytest.raises(ValueError, match="'sse9'.*baseline"):
        native.force_isa("sse9")


def test_the_native_library_reports_a_call_it_cannot_take():
    """The last check before the kernels: a view that does not fit the tensor is a status, not a crash."""
    if not native.isas():
        pytest.skip(native.library()[1])
    q = torch.zeros(1, 5, 1, 8)
    wrong = registry.get("cpp")
    from timesformer_kernels import grid

    with pytest.raises(RuntimeError, match="does not fit 5 tokens"):
        wrong.forward(q, q, q, grid.view("time", (1, 3, 4), "none"), 1.0, None)


# Fault 29: the library is missing, corrupt or of another ABI


def copied(folder, library, record=None):
    """The package in a folder of its own, with another library file in it."""
    target = folder / "timesformer_kernels"
    for path in PACKAGE.rglob("*.py"):
        to = target / path.relative_to(PACKAGE)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    if library is not None:
        (target / "_cpu.so").write_bytes(library)
    if record is not None:
        (target / "_build_info.json").write_text(json.dumps(record))
    done = subprocess.run([sys.executable, "-c", CALL, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reason, table, same, forced = done.stdout.strip().splitlines()
    assert reason in table and reason in forced and forced.startswith("backend 'cpp' cannot run: ")
    assert same == "True"  # auto went on with the reference
    return reason


def test_29_missing_library_gives_the_reason_of_the_build(tmp_path):
    record = {"_cpu": {"status": "skipped: no C++ compiler found"}}
    assert "no C++ compiler found" in copied(tmp_path, None, record)


def test_29_missing_library_without_a_record(tmp_path):
    assert "not built" in copied(tmp_path, None)


@pytest.mark.parametrize("content", [b"", b"\x7fELF but no more", b"text"], ids=["empty", "truncated", "text"])
def test_29_corrupt_library(tmp_path, content):
    assert "does not load" in copied(tmp_path, content)


def compiled(folder, source):
    (folder / "other.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", str(folder / "other.c"), "-o", str(folder / "other.so")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    return (folder / "other.so").read_bytes()


def test_29_library_of_another_abi(tmp_path):
    source = "int tsk_abi_version() { return 999; } long tsk_attention_size() { return 8; }"
    reason = copied(tmp_path / "package", compiled(tmp_path, source))
    assert "999" in reason and "reinstall" in reason


def test_29_library_that_is_something_else(tmp_path):
    assert "reinstall" in copied(tmp_path / "package", compiled(tmp_path, "int nothing_of_ours() { return 0; }"))


def test_30_import_without_home(tmp_path):
    """Nothing is written or looked up in HOME at import."""
    environment = {"PATH": "", "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import torch; from timesformer_kernels import time_attention; x = torch.ones(1, 5, 1, 8)"
    code += "; time_attention(x, x, x, frames=2)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_passes_through(fused, monkeypatch):
    """A workspace that cannot be had is torch's own error, and the next call works."""
    q, k, v = make_qkv(1, 1 + 6 * 4, 2, 8, device=device_of(fused))
    expected = time_attention(q, k, v, frames=4, backend=fused)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        patch.setattr(torch, "empty_like", full)
        patch.setattr(torch.Tensor, "new_empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            time_attention(q, k, v, frames=4, backend=fused)
    assert torch.equal(time_attention(q, k, v, frames=4, backend=fused), expected)
