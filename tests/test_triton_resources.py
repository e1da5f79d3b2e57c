# SPDX-License-Identifier: Apache-2.0
"""The gate on compiled kernels, scripts/triton_resources.py: it sees what is wrong, and the main shapes pass it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "triton_resources.py"
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
def gate():
    spec = importlib.util.spec_from_file_location("triton_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    done = run(tmp_path, SCRIPT, "--arch", str(arch), *which, "--workers", "1", "--json", out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = json.loads(out.read_text())["reports"]
    found = {(report["kernel"], report["members"]) for report in reports}
    assert found >= {(f"resident_{direction}", m) for direction in ("forward", "backward") for m in members}
    assert all(report["arch"] == arch and 16 < report["registers"] <= 255 for report in reports)


def test_a_tile_too_large_fails(tmp_path):
    """The same kernel in one warp cannot hold its scores in registers."""
    job = dict(arch=80, dtype="bfloat16", precision="ieee", head_dim=64, scheme="time", members=96, cls="exclude")
    job |= dict(kernels=["resident_forward"], configs={"resident_forward": (128, 128, 1, 1)})
    code = f"import json, triton_resources; print(json.dumps(triton_resources.build({job})))"
    done = run(tmp_path, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); {code}")
    assert done.returncode == 0, done.stderr[-4000:]
    (report,) = json.loads(done.stdout)
    assert report["num_warps"] == 1 and report["tile"][0] == 128
    assert any(problem.startswith("spills") for problem in report["problems"])
