# SPDX-License-Identifier: Apache-2.0
"""The gate on compiled kernels, scripts/triton_resources.py, sees what is wrong and lets the main shapes pass; and
scripts/tune_triton.py, which chooses by it.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
GOOD = dict(kernel="resident_forward", arch=90, dtype="bfloat16", precision="ieee", head_dim=64, cls="exclude", spill=0)
GOOD |= dict(shared=4096, loads={"LDG.E.128": 12, "STG.E.128": 4, "STG.E.U16": 1}, matrix={"HMMA": 16}, per_row=35.0)

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function resident_forward:
  REG:80 STACK:{stack} SHARED:0 LOCAL:{local} CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
\t.headerflags\t@"EF_CUDA_SM90"
\t.section\t.debug_frame,"",@progbits
        /*0000*/ \t.byte\t0xff
\t.section\t.text.resident_forward,"ax",@progbits
.text.resident_forward:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   FFMA R5, R6, R7, R8 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP;
        /*0090*/                   NOP;
\t.section\t.nv.constant0.resident_forward,"a",@progbits
        /*0000*/                   LDL R1, [R2] ;
"""


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture(scope="module")
def gate(scripts):
    return importlib.import_module("triton_resources")


@pytest.fixture(scope="module")
def tune(gate):
    return importlib.import_module("tune_triton")


def run(tmp_path, *command):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(tmp_path / "cache"), OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=500)


def test_a_listing_is_read(gate):
    found = gate.read_listing(USAGE.format(stack=0, local=0), LISTING)
    assert found == {
        "registers": 80,
        "spill": 0,  # the LDL of another section is data
        "instructions": 8,  # without the padding
        "loads": {"LDG.E.128": 2, "STG.E.128": 1},
        "matrix": {"HMMA": 1, "HGMMA": 1},
        "fma": 1,
    }


@pytest.mark.parametrize("stack, local, line, spill", [(16, 0, "", 16), (0, 8, "", 8), (0, 0, "STL [R1], R2", 1)])
def test_every_kind_of_spill_is_counted(gate, stack, local, line, spill):
    listing = LISTING.replace("EXIT", f"{line} ;\n        /*0071*/                   EXIT" if line else "EXIT")
    assert gate.read_listing(USAGE.format(stack=stack, local=local), listing)["spill"] == spill


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        ({"spill": 8}, "spills (8)"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, the limit is 232448"),
        ({"arch": 80, "shared": 100 << 10}, "102400 bytes of shared memory, the limit is 101376"),
        ({"loads": {"LDG.E.128": 9, "LDG.E.U16": 3}}, "narrow loads {'LDG.E.U16': 3}"),
        ({"loads": {"LDG.E.64": 12, "STG.E.128": 4}}, "no 16-byte load"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"arch": 80, "matrix": {"HGMMA": 4}}, "no matrix instruction"),  # that GPU has none of these
        ({"dtype": "float32", "precision": "tf32", "matrix": {}}, "no matrix instruction"),
        ({"dtype": "float32"}, "matrix instructions in true float32: {'HMMA': 16}"),
        ({"dtype": "float32", "matrix": {}}, None),
        ({"per_row": 110.1}, "110.1 instructions per row and head, the budget is 110"),
        ({"per_row": 110.1, "kernel": "resident_backward"}, None),
        ({"per_row": 193.1, "kernel": "resident_backward"}, "193.1 instructions per row and head, the budget is 193"),
        ({"per_row": 500.0, "head_dim": 128}, None),  # the budget is for 64
        ({"kernel": "class_forward", "matrix": {}, "loads": {"LDG.E.U16": 1}}, None),
        ({"kernel": "class_forward", "matrix": {}, "spill": 1}, "spills (1)"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_reported(gate, change, problem):
    assert gate.judge(GOOD | change) == ([problem] if problem else [])


@pytest.mark.parametrize("arch, members", [(90, (8, 96, 197)), (80, (8,))])
def test_the_main_shapes_pass(tmp_path, arch, members):
    out, lengths = tmp_path / "out.json", map(str, members)
    which = "--dtype", "bfloat16", "--head-dim", "64", "--members", *lengths
    done = run(tmp_path, SCRIPTS / "triton_resources.py", "--arch", str(arch), *which, "--workers", "1", "--json", out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = json.loads(out.read_text())["reports"]
    found = {(report["kernel"], report["members"]) for report in reports}
    assert found >= {(f"resident_{direction}", m) for direction in ("forward", "backward") for m in members}
    assert all(report["arch"] == arch and 16 < report["registers"] <= 255 for report in reports)


def test_a_row_meets_the_shapes_that_its_kernel_serves(tune):
    assert tune.cases("resident_forward", "bits16", 64, 0, 8) == [("time", 8, "exclude")]
    assert tune.cases("resident_forward", "bits16", 64, 8, 10) == [("time", 10, "exclude")]  # none of TimeSformer's
    assert tune.cases("resident_forward", "bits16", 64, 32, 64) == [("time", 64, "exclude"), ("space", 50, "per_group")]
    streamed = tune.cases("streaming_forward", "bits16", 64, 0, 1 << 30)
    assert ("space", 785, "per_group") in streamed and ("time", 96, "exclude") not in streamed
    assert ("time", 96, "exclude") in tune.cases("streaming_backward_q", "ieee", 64, 0, 1 << 30)  # float32 is larger


def test_every_row_of_the_table_is_compiled(gate):
    configs = json.loads(gate.regimes.TABLE.read_text())["configs"]
    for arch, kernel, kind, head_dim in itertools.product(
        configs, configs["sm_8x"], ("bits16", "ieee", "tf32"), (64, 128)
    ):
        resident, direction = kernel.startswith("resident"), "forward" if kernel.endswith("forward") else "backward"
        itemsize = 2 if kind == "bits16" else 4
        met = {
            members
            for _, members, _ in gate.CASES + gate.OTHERS
            if gate.regimes.resident(direction, members, itemsize, head_dim) == resident
        }
        low = 0
        for high, *_ in configs[arch][kernel][kind][str(head_dim)]:
            assert any(low < members <= high for members in met), f"{arch} {kernel} {kind} {head_dim}: {low} to {high}"
            low = high


@pytest.mark.parametrize(
    "kernel, longest", [("resident_forward", 8), ("resident_backward", 197), ("streaming_forward", 785)]
)
def test_the_present_configuration_is_the_first_candidate(tune, kernel, longest):
    found = tune.candidates(kernel, longest, [48, 48, 3, 5])
    assert found[0] == (48, 48, 3, 5) and len(found) == len(set(found)) > 5
    for m, n, warps, stages in found[1:]:
        assert m & (m - 1) == n & (n - 1) == 0 and min(m, n) >= 16 and warps in (1, 2, 4, 8) and stages in (1, 2, 3)
        assert longest > 32 or m >= longest  # a packed tile holds whole sequences


def test_a_row_changes_for_a_gain_beyond_the_noise_only(tune):
    a, b, c = (16, 16, 1, 1), (32, 32, 1, 1), (64, 64, 2, 1)
    assert tune.choose("row", [a, b, c], [1.0, 0.9, 0.8]) == c
    assert tune.choose("row", [a, b, c], [1.0, 0.995, 1.2]) == a
    assert tune.choose("row", [b, c], None) == b


def test_tuning_without_a_gpu_replaces_a_row_that_spills(tmp_path):
    table = json.loads((SCRIPTS.parent / "kernels/timesformer_kernels/backends/triton/configs.json").read_text())
    rows = table["configs"]["sm_8x"]["resident_forward"]["bits16"]["64"]
    (index,) = [i for i, row in enumerate(rows) if row[0] == 128]
    good, rows[index] = rows[index], [128, 128, 128, 1, 1]
    bad, out = tmp_path / "bad.json", tmp_path / "out.json"
    bad.write_text(json.dumps(table))
    which = "--arch sm_8x --kernel resident_forward --kind bits16 --head-dim 64 --limit 128 --workers 1".split()
    argv = ["tune_triton.py", "--static", *which, "--out", str(out)]
    code = f"import pathlib, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import tune_triton; sys.argv = {argv}"
    code += f"; tune_triton.regimes.TABLE = pathlib.Path({str(bad)!r}); sys.exit(tune_triton.main())"
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "(128, 128, 1, 1): spills" in done.stdout
    result = json.loads(out.read_text())
    new = result["configs"]["sm_8x"]["resident_forward"]["bits16"]["64"][index]
    assert new[0] == 128 and new[3] > 1
    result["configs"]["sm_8x"]["resident_forward"]["bits16"]["64"][index] = rows[index] = good
    assert result["configs"] == table["configs"]  # nothing else moved
    made = result["made"]["sm_8x"]
    assert made["device"] is None and made["command"].startswith("python scripts/tune_triton.py --static --arch sm_8x")
    assert str(tmp_path) not in made["command"]
    assert out.read_text().count("\n") < 1000  # a row is a line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arch", "sm_9x"], "--arch needs --static" if torch.cuda.is_available() else "no GPU; --static"),
        (["--static", "--kernel", "resident"], "--kernel: got resident, expected some of resident_forward"),
        (["--static", "--limit", "7"], "the table has no such row"),
    ],
)
def test_tuning_refuses_what_it_cannot_do(tune, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["tune_triton.py", *options, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as refused:
        tune.main()
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out.json").exists()
