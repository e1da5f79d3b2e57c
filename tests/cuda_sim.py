# SPDX-License-Identifier: Apache-2.0
"""What the tests of the CUDA kernels share: the library for the CPU (simt_build.py) as backend "cuda".

The fixtures `library` and `simt` reach every test through conftest.py.
"""

import contextlib
import os
import zlib
from dataclasses import replace

import pytest
import simt_build
import torch
from oracle import check

from timesformer_kernels import grid_attention, native_cuda, registry
from timesformer_kernels.backends import cuda
from timesformer_kernels.grid import view as make_view

BITS16 = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda d: str(d).split(".")[1])
bits16 = pytest.mark.parametrize("dtype", BITS16, ids=lambda d: str(d).split(".")[1])


@contextlib.contextmanager
def simulated(library, device=0):
    """The backend "cuda" for CPU tensors, by a library for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        able = replace(registry.get("cuda"), why_not=lambda kind, *rest: None if kind == "cpu" else "simulated")
        patch.setitem(registry._BACKENDS, "cuda", able)
        patch.setattr(native_cuda, "library", lambda: (library, None))
        patch.setattr(native_cuda, "where", lambda x: (device, 0))
        registry.resolve.cache_clear()
        try:
            yield
        finally:
            registry.resolve.cache_clear()


@pytest.fixture(scope="module")
def library():
    if simt_build.compiler() is None:
        pytest.skip("no C++ compiler")
    if os.uname().machine != "x86_64":
        pytest.skip("tests/simt switches threads on x86-64 alone")
    return native_cuda.Library(simt_build.library())


@pytest.fixture
def simt(library, request):
    """The library, in use on a GPU of compute capability 8.0; every test has an order of threads of its own."""
    library.c.simt_seed(zlib.crc32(request.node.name.encode()) | 1)
    library.c.simt_capability(80)
    with simulated(library):
        yield library
    library.c.simt_capability(90)


def run(case):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend="cuda"))


def view_of(case):
    return make_view(case.scheme, case.grid, case.cls, case.order)


def regime(case, q, k, v):
    return native_cuda.regime(q, k, v, torch.empty(q.shape, dtype=q.dtype), view_of(case))


def tensor_cores(case, aligned=True, head_dim=64):
    """Name of the kernels that serve 16 bits at head_dim 32, 64 or 128."""
    members = view_of(case).length + (case.cls in ("key", "per_group", "global"))
    if not aligned or (case.cls == "global" and members <= 16):
        return "generic"
    return (
        "short"
        if members <= 16
        else "resident"
        if members <= (128 if head_dim > 64 else 256) and case.cls != "global"
        else "streaming"
    )


def checked(simt, case, q, k, v, expected, **more):
    """`oracle.check`, and that the kernels of the expected name did it."""
    assert regime(case, q, k, v) == expected
    before = simt.c.simt_launches()
    check(run(case), q, k, v, case, **more)
    assert simt.c.simt_launches() >= before + 2
