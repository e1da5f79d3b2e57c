# SPDX-License-Identifier: Apache-2.0
"""The environment report: complete, truthful about what is missing, and never a reason to fail."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from timesformer_kernels import available_backends, choice, info, native, native_cuda, registry


def printed(capsys, *argv):
    assert info.main(list(argv)) == 0
    return capsys.readouterr().out


def test_json_holds_what_a_bug_report_needs(capsys):
    report = json.loads(printed(capsys, "--json"))
    assert report["torch"] == torch.__version__
    assert report["python"] == platform.python_version()
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["auto"]["cpu"]["float64"] in ("cpp", "reference")
    assert set(report["libraries"]) == {"_cpu", "_cuda"}
    assert report["cuda"]["available"] == torch.cuda.is_available()
    assert "cuda" in report["backends"] or not report["cuda"]["available"]
    assert report["choice"]["rules"] and 0 <= report["choice"]["measured"] <= len(report["choice"]["rules"])


def test_every_backend_answers_for_every_dtype(capsys):
    backends = json.loads(printed(capsys, "--json"))["backends"]["cpu"]
    assert set(backends) == {"float32", "bfloat16", "float16", "float64"}
    for dtype, answers in backends.items():
        assert list(answers) == list(available_backends())
        for name, reason in answers.items():
            assert reason == registry.get(name).why_not("cpu", getattr(torch, dtype), 64)
        assert answers["reference"] is None


def test_the_library_and_its_instruction_sets_are_reported(capsys):
    library, reason = native.library()
    if library is None:
        pytest.skip(reason)
    report = json.loads(printed(capsys, "--json"))
    assert report["libraries"]["_cpu"]["ok"] and report["libraries"]["_cpu"]["build"]["status"] == "ok"
    assert report["cpu"]["isa"] == native.isa()
    assert "baseline" in report["cpu"]["usable_isas"]
    assert f"{native.isa()} (usable: " in printed(capsys)


def test_the_text_gives_one_line_where_dtypes_agree(capsys, monkeypatch):
    def why_not(device_type, dtype, head_dim):
        assert (device_type, head_dim) == ("cpu", 64)
        return "no kernel for 16-bit types" if dtype.itemsize == 2 else None

    picky = registry.Backend("picky", forward=None, backward=None, why_not=why_not)
    monkeypatch.setitem(registry._BACKENDS, "picky", picky)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = [" ".join(line.split()) for line in printed(capsys).splitlines()]
    chosen = registry.resolve("auto", "cpu", torch.float32, 64).name
    assert f"auto takes {chosen} [float32, bfloat16, float16, float64]" in lines
    assert "picky can run [float32, float64]" in lines
    assert "picky no kernel for 16-bit types [bfloat16, float16]" in lines


@pytest.mark.parametrize("build", [{}, {"_cpu": {"status": "skipped: x"}, "_cuda": {"status": "skipped: y"}}])
def test_a_missing_library_is_a_line_and_not_a_failure(capsys, monkeypatch, tmp_path, build):
    monkeypatch.setattr(native, "library", lambda: (None, "it was never built"))
    monkeypatch.setattr(native, "build_info", lambda: build)
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setattr(native_cuda, "library", native_cuda.library.__wrapped__)
    text = printed(capsys)
    assert "it was never built" in text
    assert "none: no CPU library" in text
    assert ("y" if build else "no build record") in text
    report = json.loads(printed(capsys, "--json"))
    library = {"ok": False, "reason": "it was never built", "stale": None, "build": build.get("_cpu")}
    assert report["libraries"]["_cpu"] == library
    assert report["cpu"]["isa"] is None and report["cpu"]["usable_isas"] == []


def test_gpus_are_listed(monkeypatch):
    properties = type("Properties", (), {"name": "a GPU", "major": 9, "minor": 0, "total_memory": 2**37})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    report = info.report()
    assert report["cuda"]["gpus"] == [{"name": "a GPU", "capability": "9.0", "memory_bytes": 2**37}]
    assert set(report["backends"]) == set(report["auto"]) == {"cpu", "cuda"}
    assert "a GPU (9.0, 128 GiB)" in info.render(report)


def test_what_auto_takes_on_a_gpu_is_said_by_length(capsys, monkeypatch):
    """By two rules, of which one was measured."""
    numbers = dict(device="a GPU", date="2031-02-03", file="a.json", ms={"t": {"cuda": 1.0}}, ratio=2.0, noise=0.0)
    halves = ("any", ("float16",), (64, 64))
    rules = (
        choice.Rule(*halves, (0, 16), "cuda", {"measured": numbers}),
        choice.Rule(*halves, (17, None), "triton", {"expected": "it is so"}),
    )
    monkeypatch.setattr(choice, "rules", lambda: rules)
    monkeypatch.setattr(info, "_gpus", lambda: [{"name": "a GPU", "capability": "9.0", "memory_bytes": 2**37}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90" if device.type == "cuda" else None)
    for name in ("triton", "cuda"):
        able = replace(registry.get(name), why_not=lambda device, *rest: None if device == "cuda" else "no")
        monkeypatch.setitem(registry._BACKENDS, name, able)
    registry.resolve.cache_clear()
    try:
        lines = [" ".join(line.split()) for line in printed(capsys).splitlines()]
    finally:
        monkeypatch.undo()
        registry.resolve.cache_clear()
    assert "auto takes cuda up to 16 members, triton [float16]" in lines
    assert "rules by which auto chooses on GPUs, 2, of which measured: 1; the first that fits" in lines
    assert any(line.startswith("any, float16, head_dim 64, 17 or more members triton, expected") for line in lines)
    assert any("cuda, measured: 2.00 times as fast" in line for line in lines)


def test_environment_variables_of_ours_and_tritons_are_shown_and_no_others(capsys, monkeypatch):
    monkeypatch.setenv("TIMESFORMER_KERNELS_CUDA", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("UNRELATED", "secret")
    report = json.loads(printed(capsys, "--json"))
    assert report["environment"]["TIMESFORMER_KERNELS_CUDA"] == "0"
    assert report["environment"]["TRITON_INTERPRET"] == "1"
    assert all(name.startswith(("TIMESFORMER_KERNELS_", "TRITON_")) for name in report["environment"])
    assert "secret" not in printed(capsys)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_as_a_command_beside_a_triton_that_breaks_at_import(tmp_path, interpret):
    """It is imported where only it can answer, for the interpreter or a GPU, and must not take the report down."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise RuntimeError('triton was imported')\n")
    (tmp_path / "triton-9.9.dist-info").mkdir()
    (tmp_path / "triton-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.9\n")
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "timesformer_kernels.info", "--json"]
    environment = {**os.environ, "PYTHONPATH": search, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["triton"] == "9.9"
    reasons = {device: answers["float32"]["triton"] for device, answers in report["backends"].items()}
    asked = "cpu" if interpret == "1" else "cuda"
    for device, reason in reasons.items():
        imported = reason == "its kernels do not import: triton was imported"
        assert imported == (device == asked), reason
