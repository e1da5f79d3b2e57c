# SPDX-License-Identifier: Apache-2.0
"""The gate on compiled CUDA kernels, scripts/cuda_resources.py, sees what is wrong and lets the short kernels pass."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SHORT = "_ZN3tsk20short_forward_kernelI13__nv_bfloat16Li64ELi8EEEvNS_7ProblemENS_9ShortGridE"
ROWS = "_ZN3tsk12forward_rowsIfLi4EEEvNS_7ProblemENS_6BlocksE"
ASSEMBLER = f"""
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function '{SHORT}'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SHORT}' for 'sm_90a'
ptxas info    : Function properties for {SHORT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers
ptxas info    : Compile time = 40.1 ms
ptxas info    : Compiling entry function '{ROWS}' for 'sm_90a'
ptxas info    : Function properties for {ROWS}
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2560 bytes smem
"""
LISTING = f"""
\t.headerflags\t@"EF_CUDA_SM90"
\t.section\t.debug_frame,"",@progbits
        /*0000*/                   LDL R1, [R2] ;
\t.section\t.text.{SHORT},"ax",@progbits
.text.{SHORT}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   MOVM.16.MT88 R5, R6 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP;
\t.section\t.text.{ROWS},"ax",@progbits
        /*0000*/                   STL [R1], R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0010*/                   STG.E.128 desc[UR4][R2.64], R4 ;
\t.section\t.nv.constant0.{ROWS},"a",@progbits
        /*0000*/                   LDL R1, [R2] ;
"""
GOOD = dict(arch="90a", kernel="short_forward", arguments=["bfloat16", 64, 8], spill=0, local=0, shared=0, matrix=16)
GOOD |= dict(memory={"LDG.128": 12, "STG.128": 4, "STG": 4}, instructions=560, per_row=35.0)
BACKWARD = dict(kernel="short_backward", memory={"LDG.128": 16, "STG.128": 12})


@pytest.fixture(scope="module")
def gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("cuda_resources")


def run(*options, **env):
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    command = [sys.executable, SCRIPTS / "cuda_resources.py", *options]
    return subprocess.run(command, env=environment | env, capture_output=True, text=True, timeout=500)


def test_names_are_read(gate):
    assert gate.plain_name(SHORT) == ("short_forward", ("bfloat16", 64, 8))
    assert gate.plain_name(ROWS) == ("forward_rows", ("float32", 4))
    assert gate.plain_name("_Z6kernelI6__halfLb1ELin3EEvv") == ("kernel", ("float16", True, -3))
    assert gate.plain_name("_ZN3tsk12_GLOBAL__N_114class_row_zeroEv") == ("class_row_zero", ())


def test_the_account_of_the_assembler_is_read(gate):
    assert gate.read_assembler(ASSEMBLER) == {
        SHORT: {"registers": 72, "spill": 0, "shared": 0, "serialized": True},
        ROWS: {"registers": 40, "spill": 28, "shared": 2560, "serialized": False},
    }


def test_a_listing_is_read(gate):
    found = gate.read_listing(LISTING)
    memory = {"LDG.128": 1, "LDG.U16": 1, "STG": 1}
    # Without the padding; an LDL of another section is data.
    assert found[SHORT].pop("hopper")["FFMA"] == 0 and found[ROWS].pop("hopper")["HGMMA"] == 2
    assert found[SHORT] == {"instructions": 7, "local": 0, "memory": memory, "matrix": 1, "transposes": 1}
    assert found[ROWS] == {"instructions": 4, "local": 1, "memory": {"STG.128": 1}, "matrix": 2, "transposes": 0}


@pytest.mark.parametrize("members, rows", [(8, 16), (16, 16), (5, 15), (0, 9)])
def test_rows_of_a_warp(gate, members, rows):
    assert gate.rows(members) == rows


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        (BACKWARD, None),
        ({"spill": 8}, "spills (8)"),
        ({"local": 2}, "spills (2)"),
        ({"shared": 16}, "16 bytes of shared memory, it needs none"),
        ({"memory": {"LDG.128": 11, "STG.128": 4}}, "11 LDG.128, not 12"),
        ({"memory": {"LDG.128": 12, "STG.128": 2, "STG": 16}}, "2 STG.128, not 4"),  # a store taken apart
        ({"memory": {"LDG.128": 12, "STG.128": 4, "LDG.U16": 3}}, "narrow accesses {'LDG.U16': 3}"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"per_row": 55.1}, "55.1 instructions per row and head, the budget is 55"),
        (BACKWARD | {"per_row": 55.1}, None),
        (BACKWARD | {"per_row": 96.6}, "96.6 instructions per row and head, the budget is 96.5"),
        ({"arguments": ["bfloat16", 64, 0], "per_row": 110}, None),
        (
            {"arguments": ["bfloat16", 64, 0], "per_row": 110.1},
            "110.1 instructions per row and head, the budget is 110",
        ),
        ({"kernel": "forward_rows", "arguments": ["float32", 4], "matrix": 0, "memory": {"LDG": 3}}, None),
        ({"kernel": "forward_rows", "shared": 49153}, "49153 bytes of shared memory, the limit is 49152"),
        ({"kernel": "forward_rows", "spill": 4}, "spills (4)"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_reported(gate, change, problem):
    assert gate.judge(GOOD | change) == ([problem] if problem else [])


HOPPER = {
    "arch": "90a",
    "kernel": "hopper_forward",
    "arguments": ["bfloat16", 64],
    "spill": 0,
    "shared": 0,
    "registers": 128,
    "serialized": False,
    "hopper": {"HGMMA": 34, "UTMALDG": 16},
}


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        ({"registers": 129}, "129 registers, too many for 2 blocks"),
        ({"registers": 255, "arguments": ["bfloat16", 128]}, None),
        ({"registers": 168, "kernel": "hopper_backward_keys"}, None),
        ({"registers": 169, "kernel": "hopper_backward_queries"}, "169 registers, too many for 3 blocks"),
        ({"serialized": True, "kernel": "hopper_backward_keys"}, "wgmma instructions wait for one another"),
        ({"serialized": True}, "wgmma instructions wait for one another"),
        ({"hopper": {"HGMMA": 0, "UTMALDG": 16}}, "no HGMMA"),
        ({"hopper": {"HGMMA": 34, "UTMALDG": 0}}, "no UTMALDG"),
        ({"arch": "100", "hopper": {"HGMMA": 0, "UTMALDG": 0}}, None),  # empty there
    ],
)
def test_what_is_wrong_with_the_kernel_of_hopper_is_reported(gate, change, problem):
    assert gate.judge(HOPPER | change) == ([problem] if problem else [])


def test_a_budget_is_for_a_head_dim_of_64(gate):
    wide = GOOD | {"arguments": ["bfloat16", 128, 8], "memory": {"LDG.128": 24, "STG.128": 8}}
    assert gate.judge(wide | {"per_row": 500.0}) == []


def test_without_a_disassembler_the_assembler_is_judged(gate):
    report = {key: GOOD[key] for key in ("arch", "kernel", "arguments", "spill", "shared")} | {"registers": 72}
    assert gate.judge(report) == [] and gate.judge(report | {"spill": 4}) == ["spills (4)"]
    assert gate.line(report | {"problems": []}).endswith("smem     0")


def test_without_nvcc_there_is_nothing_to_do(tmp_path):
    for env in ({"PATH": str(tmp_path)}, {"CUDA_HOME": str(tmp_path)}):
        done = run(**env)
        assert (done.returncode, done.stdout) == (2, "nvcc is not installed: no CUDA kernel was compiled\n")


def test_every_kernel_compiles_and_passes(gate, tmp_path):
    if gate.find_nvcc() is None:
        pytest.skip("no nvcc")
    out = tmp_path / "out.json"
    done = run("--arch", "90a", "--json", out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = json.loads(out.read_text())["reports"]
    short = {(r["kernel"], *r["arguments"]) for r in reports if r["kernel"] in gate.BUDGET}
    assert len(short) == 2 * 2 * 3 * 6  # direction, dtype, head_dim, members
    hopper = Counter(r["kernel"] for r in reports if r["kernel"] in gate.HOPPER and r["hopper"]["HGMMA"] > 0)
    assert hopper == {"hopper_forward": 2 * 2, "hopper_backward_queries": 2, "hopper_backward_keys": 2}
    assert all(16 < report["registers"] <= 255 for report in reports if report["kernel"] in gate.BUDGET)
