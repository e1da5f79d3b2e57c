# SPDX-License-Identifier: Apache-2.0
"""Fixtures: every backend, every instruction set, skips with the backend's own reason, and NaN in fresh memory."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton

import interpreter
import pytest
from arena import poisoned, unpoisoned
from cuda_sim import library, simt  # noqa: F401
from oracle import device_of

from timesformer_kernels import available_backends, native, registry

interpreter.prepare()

ISAS = tuple(native.isas())
# The C++ backend once per instruction set that this chip runs; every other backend once.
ENGINES = [
    *(("cpp", isa) for isa in ISAS if "cpp" in available_backends()),
    *((name, None) for name in available_backends() if name != "cpp"),
]


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "needs(dtype=, head_dim=, device=): what a test asks of its backend, which is skipped where it cannot; "
        "parameters of the test named so come first",
    )


def can_run(request, name):
    """The name, or a skip with the backend's own reason why it cannot run what this test asks of it."""
    asked = {"dtype": torch.float32, "head_dim": 8, "device": device_of(name)}
    for marker in reversed(list(request.node.iter_markers("needs"))):  # the closest one last
        asked.update(marker.kwargs)
    asked.update({key: value for key, value in request.node.callspec.params.items() if key in asked})
    if reason := registry.get(name).why_not(asked["device"], asked["dtype"], asked["head_dim"]):
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=available_backends())
def backend(request):
    """Every registered backend; a new one is tested by existing."""
    return can_run(request, request.param)


@pytest.fixture(params=[name for name in available_backends() if name != "reference"])
def fused(request):
    """Every backend but the reference, which is plain differentiable torch code."""
    return can_run(request, request.param)


@pytest.fixture
def need():
    """need(backend, dtype, head_dim) skips with the backend's own reason when it cannot run there."""

    def check(name, dtype=torch.float32, head_dim=8, device=None):
        if reason := registry.get(name).why_not(device or device_of(name), dtype, head_dim):
            pytest.skip(f"{name}: {reason}")

    return check


@pytest.fixture(params=ISAS)
def isa(request):
    """Each usable instruction set of the C++ library, forced for the test and restored after it."""
    yield from forced(request.param)


@pytest.fixture(params=ENGINES, ids=lambda engine: "-".join(filter(None, engine)))
def engine(request):
    """The name of a backend; the C++ one comes once per instruction set."""
    name, isa = request.param
    can_run(request, name)
    if isa is None:
        yield name
    else:
        for _ in forced(isa):
            yield name


def forced(isa):
    before = native.isa()
    native.force_isa(isa)
    yield isa
    native.force_isa(before)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """torch.empty and its relatives return NaN."""
    with poisoned(monkeypatch):
        yield


@pytest.fixture
def traceable(poison, monkeypatch):
    """What the compiler can trace: fresh memory is torch's own, and nothing compiled is left from another test."""
    torch.compiler.reset()
    with unpoisoned(monkeypatch):
        yield
    torch.compiler.reset()
