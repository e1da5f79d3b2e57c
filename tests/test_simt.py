# SPDX-License-Identifier: Apache-2.0
"""The layer that runs CUDA device code on the CPU (tests/simt) computes what the PTX ISA says, and sees faults."""

import platform
import subprocess

import pytest
from simt_build import ROOT, compiler

FOLDER = ROOT / "tests/simt"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-I", FOLDER]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TESTS = {  # of test_simt.cpp and test_hopper.cpp
    "test_simt": [
        "products-bfloat16",  # mma.m16n8k16 by hand and through cp.async and ldmatrix, against plain loops
        "products-float16",
        "missing-wait",  # cp.async without its wait is wrong, unless it happens to have landed
        "layouts",  # every form of ldmatrix, and movmatrix
        "collectives",  # shuffles, votes, partial warps, threads that have left
        "barriers",  # three kernels that lack one are wrong in almost every order, and right with it
        "orders",  # blocks run in every order, with fresh shared memory
        "numbers",  # rounding of every bfloat16 and float16
        "faults",  # deadlocks, missing lanes, misaligned accesses: reported, and the next launch is right
        "runtime",  # launch limits, shared memory per device and kernel, errors made to order
    ],
    "test_hopper": [
        "products-bfloat16",  # wgmma of every shape and both layouts, whenever it reads, against plain loops
        "products-float16",
        "boxes",  # of a tensor, also past its ends; read before they have landed they are NaN
        "refused-tensors",  # sizes, steps and addresses that the accelerator does not take
        "barriers",  # a ring of two places, wrong in almost every order without the barrier of those read
        "faults",  # missing fences and waits, warps that disagree, bytes that never come
    ],
}
CASES = [(program, name) for program, names in TESTS.items() for name in names]
OVERRUNS = {
    "over-static": "heap-buffer-overflow",
    "over-dynamic": "heap-buffer-overflow",
    "over-global": "heap-buffer-overflow",
    "over-stack": "stack-buffer-overflow",
}

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="fibers are switched for x86-64 only"),
]


def build(folder, *flags):
    """{name: program}"""
    programs = {name: folder / name for name in TESTS}
    for name, program in programs.items():
        command = [*compiler(), *FLAGS, *flags, FOLDER / f"{name}.cpp", "-o", program]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return programs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build(tmp_path_factory.mktemp("simt_sanitized"), *SANITIZE)


def run(program, name):
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("program, name", CASES)
def test_device_code_on_the_cpu(plain, program, name):
    code, said = run(plain[program], name)
    assert code == 0, said


@pytest.mark.parametrize("program, name", CASES)
def test_the_layer_is_clean_under_sanitizers(sanitized, program, name):
    code, said = run(sanitized[program], name)
    assert code == 0, said


@pytest.mark.parametrize("name", OVERRUNS)
def test_an_overrun_is_reported_with_its_thread(sanitized, name):
    code, said = run(sanitized["test_simt"], name)
    assert code != 0 and OVERRUNS[name] in said, said
    thread = {"over-dynamic": 31, "over-stack": 0}.get(name, 32)
    assert f"simt: block (0,0,0) thread ({thread},0,0) seed 1" in said, said
