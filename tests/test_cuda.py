# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, executed on the CPU (simt_build.py): out, dq, dk and dv against the float64 oracle, threads in
shuffled order, guards around every tensor, NaN in fresh memory, and what becomes of a failed launch.

Calls go the way of the public functions, through the backend "cuda" with the library for the CPU in place of the real
one. On a GPU the other tests run this backend as any other.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import simt_build
import torch
from arena import Arena, carved
from cuda_sim import BITS16, bits16, checked, dtypes, regime, run, simulated, tensor_cores, view_of
from oracle import (
    Case,
    assert_no_worse,
    attention,
    check,
    every_case,
    make_dout,
    make_qkv,
    with_gradients,
    with_weights,
)

from timesformer_kernels import grid_attention, native, native_cuda
from timesformer_kernels.backends import cuda

NO_KERNEL_IMAGE, LAUNCH_FAILURE = 209, 719  # cudaError_t


# --- against the oracle ----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_scheme_class_mode_and_order(simt, case, dtype):
    checked(simt, case, *make_qkv(2, case.tokens, 2, 8, dtype), "generic")


@bits16
@pytest.mark.parametrize("case", every_case((2, 4, 4), (3, 2, 5)), ids=str)
def test_every_scheme_on_tensor_cores(simt, case, dtype):
    checked(simt, case, *make_qkv(2, case.tokens, 3, 32, dtype), tensor_cores(case))


@bits16
@pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group"])
@pytest.mark.parametrize("frames", range(1, 18))
def test_short_lengths(simt, frames, cls, dtype):
    """Every number of members up to 16, and of sequences in the last tile; one beyond."""
    case = Case("time", (1, 19, frames), cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, 32, dtype, seed=frames), tensor_cores(case))


@bits16
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("frames, heads, batch", [(8, 12, 1), (16, 5, 2), (8, 1, 3), (4, 3, 2), (5, 4, 1), (15, 6, 1)])
def test_short_heads_and_head_dims(simt, frames, heads, batch, head_dim, cls, dtype):
    case = Case("time", (1, 5, frames), cls)
    checked(simt, case, *make_qkv(batch, case.tokens, heads, head_dim, dtype), tensor_cores(case))


@bits16
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
@pytest.mark.parametrize("frames", [17, 24, 31, 32, 33, 48, 64, 97, 129])
def test_long_lengths(simt, frames, cls, dtype):
    case = Case("time", (1, 2, frames), cls)
    checked(simt, case, *make_qkv(1, case.tokens, 2, 32, dtype, seed=frames), tensor_cores(case))


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group", "global"])
@pytest.mark.parametrize("patches, frames, head_dim", [((14, 14), 2, 64), ((16, 16), 1, 32), ((5, 9), 2, 128)])
def test_space_on_tensor_cores(simt, patches, frames, head_dim, cls, dtype):
    """224 px; the most that is resident, and one more; wide heads."""
    case = Case("space", (*patches, frames), cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, head_dim, dtype), tensor_cores(case))


@dtypes
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
@pytest.mark.parametrize("frames", [1, 2, 3, 17, 31, 32, 33, 64, 97])
def test_generic_lengths(simt, frames, cls, dtype):
    case = Case("time", (1, 3, frames), cls)
    checked(simt, case, *make_qkv(2, case.tokens, 2, 16, dtype, seed=frames), "generic")


@dtypes
@pytest.mark.parametrize("cls", ["per_group", "global"])
def test_frames_of_a_224_pixel_video(simt, cls, dtype):
    case = Case("space", (14, 14, 2), cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, 20, dtype), "generic")


@dtypes
@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 31, 33, 40, 63, 64, 65, 80, 127, 128, 129, 192, 255, 256])
def test_head_dims(simt, head_dim, dtype):
    case = Case("space", (3, 7, 2), "per_group")
    others = dtype in BITS16 and head_dim in cuda.TENSOR_CORE_HEAD_DIMS
    expected = tensor_cores(case) if others else "generic"
    checked(simt, case, *make_qkv(1, case.tokens, 2, head_dim, dtype), expected)


@dtypes
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("scheme", ["time", "space", "local", "global"])
def test_class_row_weights(simt, scheme, head_dim, dtype):
    case = with_weights(Case(scheme, (4, 2, 4), "per_group"), batch=2)
    check(run(case), *make_qkv(2, case.tokens, 3, head_dim, dtype), case)


@dtypes
@pytest.mark.parametrize("kind", ["large-logits", "constant-rows", "one-hot", "near-overflow"])
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize(
    "case",
    [
        Case("time", (3, 3, 8), "exclude"),
        Case("space", (5, 7, 2), "per_group"),
        Case("space", (2, 3, 3), "per_group"),
        Case("space", (3, 3, 3), "global", "time_major"),
        Case("time", (2, 1, 13), "key"),
    ],
    ids=str,
)
def test_hard_inputs(simt, case, head_dim, kind, dtype):
    check(run(case), *make_qkv(1, case.tokens, 2, head_dim, dtype, kind=kind), case)


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.25, 2, 1e-3])
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("scheme, cls", [("time", "exclude"), ("space", "per_group"), ("space", "global")])
def test_scales(simt, scheme, cls, head_dim, scale, dtype):
    case = Case(scheme, (3, 3, 5), cls, scale=scale)
    check(run(case), *make_qkv(2, case.tokens, 2, head_dim, dtype), case)


@dtypes
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("length, hidden", [(12, 5), (80, 33), (300, 129)])
def test_keys_of_weight_zero_come_first(simt, length, hidden, head_dim, dtype):
    """Scores of -inf up to and past the first block of keys, and one row of +inf there."""
    case = Case("joint", (1, length, 1), "none")
    q, k, v = make_qkv(1, length, 1, head_dim, dtype)
    q = q.abs()
    q[:, 5] *= -1
    k[:, :hidden] = float("-inf")
    exact = attention(*(x.double() for x in (q, k, v)), case)
    assert exact[:, 5].isnan().all() and exact[:, :5].isfinite().all()
    eager = attention(*(x.float() for x in (q, k, v)), case).to(dtype)  # torch's products of bfloat16 make infinity NaN
    assert_no_worse("out", run(case)(q, k, v), exact, eager)


# --- memory ----------------------------------------------------------------------------------------------------------

LAYOUTS = {  # q, k, v with the same values and other strides; which kernels take short sequences of them
    "contiguous": ("short", lambda x: x.contiguous()),
    "heads-first": ("short", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "batch-inside": ("short", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "every-second-row": ("short", lambda x: torch.stack([x, x + 9], 2).flatten(1, 2)[:, ::2]),
    "odd-rows": ("generic", lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1]),
    "odd-offset": ("generic", lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)),
}


@bits16
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(simt, layout, dtype):
    expected, arrange = LAYOUTS[layout]
    case = Case("time", (2, 3, 8), "exclude")
    q, k, v = make_qkv(2, case.tokens, 3, 32, dtype)
    checked(simt, case, *map(arrange, (q, k, v)), expected)
    checked(simt, case, q, k, v, "short", dout=arrange(make_dout(q)))
    checked(simt, case, q, arrange(k), v, expected, dout=torch.ones((), dtype=dtype).expand(q.shape))
    for case in (Case("space", (5, 4, 3), "per_group"), Case("space", (5, 4, 3), "global")):
        inputs = map(arrange, make_qkv(2, case.tokens, 3, 32, dtype))
        checked(simt, case, *inputs, tensor_cores(case, aligned=expected == "short"))


@dtypes
@pytest.mark.parametrize("gap, skew", [(0, 0), (8, 0), (3, 1)], ids=["dense", "gaps", "gaps-misaligned"])
@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize(
    "case",
    [
        Case("time", (1, 3, 1), "exclude"),
        Case("time", (1, 3, 5), "none"),
        Case("time", (1, 3, 8), "exclude"),
        Case("time", (1, 2, 17), "key"),
        Case("space", (1, 5, 3), "per_group"),
        Case("space", (3, 11, 2), "global", "time_major"),
        Case("global", (2, 4, 6), "key"),
    ],
    ids=str,
)
def test_guard_arena(simt, case, head_dim, gap, skew, dtype, monkeypatch):
    q, k, v = make_qkv(2, case.tokens, 2, head_dim, dtype)
    arena = Arena(1 << 22)

    def place(x):
        padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=dtype, skew=skew * x.element_size())
        return padded[..., : x.shape[-1]].copy_(x)

    guarded = [place(x) for x in (q, k, v, make_dout(q))]
    before = [x.clone() for x in guarded]
    with carved(monkeypatch, arena):
        got = with_gradients(run(case), *guarded)
    assert arena.damage() == []
    assert all(x.isfinite().all() for x in got), "NaN from outside a tensor, or a row that was never written"
    assert all(torch.equal(x, y) for x, y in zip(guarded, before, strict=True)), "an input was written"
    check(run(case), *guarded[:3], case, dout=guarded[3])


@dtypes
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
def test_nan_stays_in_its_sequence(simt, cls, head_dim, dtype):
    """A query reaches its own row; a key and a value their own sequence, and with a class query that row."""
    case = Case("time", (1, 5, 3), cls)
    q, k, v = make_qkv(1, case.tokens, 2, head_dim, dtype)
    where = 1 + 2 * 3 + 1  # of the third sequence
    for spoilt in range(3):
        inputs = [x.clone() for x in (q, k, v)]
        inputs[spoilt][0, where, 1] = float("nan")
        check(run(case), *inputs, case)


def test_strides_past_32_bits(simt, tmp_path):
    """Clips 2^31 elements apart, tokens 2^29: a sparse file, of which a few pages exist."""
    case, shape, strides = Case("time", (1, 2, 4), "exclude"), (2, 9, 1, 32), (2**32 + 64, 2**28, 8, 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    far = []
    for i, x in enumerate(make_qkv(2, 9, 1, 32, torch.bfloat16)):
        memory = torch.from_file(str(tmp_path / str(i)), shared=True, size=size, dtype=torch.bfloat16)
        far.append(memory.as_strided(shape, strides).copy_(x))
    assert regime(case, *far) == "short"
    near = make_qkv(2, 9, 1, 32, torch.bfloat16)
    assert torch.equal(run(case)(*far), run(case)(*near))
    case = Case("time", (1, 2, 4), "global")
    assert torch.equal(run(case)(*far), run(case)(*near))


# --- properties ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
def test_the_order_of_threads_does_not_matter(simt, cls, head_dim, dtype):
    case = Case("time", (2, 3, 9), cls)
    q, k, v = make_qkv(2, case.tokens, 2, head_dim, dtype)
    results = []
    for seed in (0, 1, 2, 3):
        simt.c.simt_seed(seed)
        results.append(with_gradients(run(case), q, k, v, make_dout(q)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@dtypes
@pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group"])
@pytest.mark.parametrize("frames", [5, 40])
def test_a_backward_without_statistics_makes_them(simt, frames, cls, dtype):
    case = Case("time", (1, 3, frames), cls)
    q, k, v = make_qkv(2, case.tokens, 2, 20, dtype)
    dout, view = make_dout(q), view_of(case)
    stats = torch.empty(cuda.stats_size(q.shape, dtype, view))
    out = cuda.forward(q, k, v, view, 0.2, None, stats)
    kept = cuda.backward(dout, q, k, v, view, 0.2, None, saved=(out, stats))
    made = cuda.backward(dout, q, k, v, view, 0.2, None)
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))


@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group", "global"])
@pytest.mark.parametrize(
    "batch, grid, heads", [(0, (1, 2, 3), 2), (2, (1, 2, 3), 0), (2, (1, 0, 3), 2), (2, (1, 2, 0), 2)]
)
def test_empty(simt, batch, grid, heads, cls, head_dim):
    """No clip, no head, no sequence, no frame: what is there of a result is the reference's."""
    case = Case("time", grid, cls)
    q, k, v = make_qkv(batch, case.tokens, heads, head_dim, torch.bfloat16)
    expected = with_gradients(lambda *x: grid_attention(*x, **case.options(backend="reference")), q, k, v, make_dout(q))
    got = with_gradients(run(case), q, k, v, make_dout(q))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


# --- what goes wrong -------------------------------------------------------------------------------------------------

FAILING = [  # the kernels that come first
    pytest.param(Case("time", (1, 2, 8), "exclude"), "short_forward", "short_backward", id="short"),
    pytest.param(Case("space", (3, 7, 2), "key"), "resident_forward", "resident_backward", id="resident"),
    pytest.param(Case("space", (3, 7, 2), "global"), "streaming_forward", "streaming_backward_queries", id="streaming"),
    pytest.param(Case("space", (2, 2, 2), "global"), "generic_forward", "generic_backward_queries", id="generic"),
    pytest.param(Case("time", (1, 0, 8), "exclude"), "class_zero", "class_zero", id="empty"),
]


@pytest.mark.parametrize("case, forward, backward", FAILING)
def test_a_failed_launch_raises_with_its_name_and_the_next_call_works(simt, case, forward, backward):
    q, k, v = (x.requires_grad_() for x in make_qkv(1, case.tokens, 2, 32, torch.bfloat16))
    expected = run(case)(q, k, v)
    gradients = lambda: torch.autograd.grad(expected, (q, k, v), make_dout(q), retain_graph=True)  # noqa: E731
    first = gradients()
    for name, call in ((forward, lambda: run(case)(q, k, v)), (backward, gradients)):
        simt.c.simt_fail_next(LAUNCH_FAILURE)
        text = rf"code {LAUNCH_FAILURE}: kernel {name}: .*\(CUDA error {LAUNCH_FAILURE}\)"
        with pytest.raises(RuntimeError, match=text):
            call()
    assert torch.equal(run(case)(q, k, v), expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_the_device_of_the_tensors_is_used_and_left(library):
    case = Case("time", (1, 2, 8), "exclude")
    q, k, v = make_qkv(1, case.tokens, 2, 32, torch.bfloat16)
    with simulated(library, device=1):
        check(run(case), q, k, v, case)
    assert library.c.simt_device() == 0
    with simulated(library, device=7), pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        run(case)(q, k, v)
    assert library.c.simt_device() == 0
    with simulated(library):
        check(run(case), q, k, v, case)


def test_why_not_of_a_device(library):
    assert library.why_not(0) is None
    assert "invalid device ordinal" in library.why_not(7)
    library.c.simt_fail_next(NO_KERNEL_IMAGE)
    reason = library.why_not(0)
    assert "no kernel for device 0 of compute capability 9.0" in reason and f"CUDA error {NO_KERNEL_IMAGE}" in reason
    assert library.why_not(0) is None


def test_bad_calls_are_refused_by_the_library(simt, tmp_path, monkeypatch):
    case = Case("time", (1, 2, 8), "exclude")
    view = view_of(case)
    q = torch.zeros(1, 17, 2, 32)
    out = torch.empty(q.shape)
    attend = lambda q, view=view, **more: native_cuda.attention(q, q, q, out, view, 1.0, None, **more)  # noqa: E731
    with pytest.raises(RuntimeError, match="no kernel for dtype code 3"):
        attend(q.double())
    with pytest.raises(RuntimeError, match="kernels for head_dim of 1 to 256, got 257"):
        attend(torch.zeros(1, 17, 1, 257))
    with pytest.raises(RuntimeError, match="a view of 2 x 8 patches does not fit 16 tokens"):
        attend(torch.zeros(1, 16, 1, 8))
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="tokens are 2\\^31 elements or more apart"):
        attend(sparse.as_strided((1, 2, 1, 8), (1, 2**31, 1, 1)), view_of(Case("time", (1, 1, 1), "exclude")))
    with pytest.raises(RuntimeError, match='mode "global" needs the forward\'s result and statistics'):
        attend(q, view_of(replace(case, cls="global")), grads=(q, out, out, out))
    params = native.params
    monkeypatch.setattr(native, "params", lambda *args: params(*args[:6], q.data_ptr(), *args[7:]))
    with pytest.raises(RuntimeError, match="q_bias is given"):
        attend(q)


def test_why_not():
    assert cuda.why_not("cpu", torch.float32, 8) == "its kernels run on cuda, not on cpu"
    assert cuda.why_not("cuda", torch.float64, 8) == "no kernel for torch.float64"
    assert cuda.why_not("cuda", torch.float32, 257) == "kernels for head_dim up to 256, got 257"


def test_why_not_without_the_library(monkeypatch):
    monkeypatch.setattr(native_cuda, "library", lambda: (None, "the CUDA library was not built (skipped: no nvcc)"))
    assert cuda.why_not("cuda", torch.float32, 8) == "the CUDA library was not built (skipped: no nvcc)"


def test_why_not_without_a_gpu(library, monkeypatch):
    monkeypatch.setattr(native_cuda, "library", lambda: (library, None))

    def broken():
        raise RuntimeError("Found no NVIDIA driver\non your system")

    monkeypatch.setattr(torch.cuda, "init", broken)
    assert cuda.why_not("cuda", torch.float32, 8) == "no usable GPU: Found no NVIDIA driver"


def test_why_not_names_the_gpu_that_cannot(library, monkeypatch):
    monkeypatch.setattr(native_cuda, "library", lambda: (library, None))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # the library knows of two
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    reason = cuda.why_not("cuda", torch.bfloat16, 64)
    assert reason.startswith("GPU 2 (card 2): cudaSetDevice: invalid device ordinal") and "hide it" in reason
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda.why_not("cuda", torch.bfloat16, 64) is None


# --- sanitizers ------------------------------------------------------------------------------------------------------

SANITIZED = [  # case, head_dim
    *((Case("time", (1, 5, frames), cls), 32) for frames in (1, 5, 8, 16) for cls in ("none", "exclude", "key")),
    *((Case("space", (1, 5, 3), cls), head_dim) for cls in ("per_group", "global") for head_dim in (64, 7)),
    (Case("time", (1, 3, 15), "per_group"), 128),
    (Case("time", (1, 2, 33), "key"), 65),
    (Case("space", (12, 12, 1), "per_group"), 64),
    (Case("space", (12, 12, 1), "per_group"), 128),
    (Case("joint", (5, 4, 13), "key"), 32),
    (Case("local", (2, 4, 3), "per_group"), 129),
    (Case("global", (2, 4, 6), "exclude", "time_major"), 32),
    (Case("joint", (0, 2, 3), "exclude"), 8),
    (Case("space", (5, 13, 2), "per_group"), 64),
    (Case("time", (1, 1, 300), "key"), 128),
    (Case("time", (1, 1, 330), "per_group"), 64),
    (Case("space", (13, 10, 2), "global"), 64),
]


def sanitized_child(path, *planted):
    """Every case once in a process with the sanitizers' run-time; they end it at the first fault."""
    library = native_cuda.Library(Path(path))
    with simulated(library):
        for seed, (case, head_dim) in enumerate(SANITIZED):
            library.c.simt_seed(seed)
            clips, heads = (2, 3) if case.tokens < 100 else (1, 1)
            for dtype in cuda.DTYPES:
                q, k, v = (x.contiguous() for x in make_qkv(clips, case.tokens, heads, head_dim, dtype))
                if planted:  # an output that has room for one clip of two
                    native_cuda.attention(q, k, v, q[:1].clone(), view_of(case), 1.0, None)
                check(run(case), q, k, v, case)
    print(library.c.simt_launches(), "launches")


def child(*arguments):
    """This file run on the sanitized library, under AddressSanitizer and UBSan."""
    preload = " ".join(simt_build.runtime(name) for name in ("libasan.so", "libubsan.so"))
    paths = os.pathsep.join([str(Path(native_cuda.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    # Python leaks on purpose; one thread, because the run-time is slow to start others.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1", "LD_PRELOAD": preload, "PYTHONPATH": paths}
    command = [sys.executable, __file__, str(simt_build.library(sanitize=True)), *arguments]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=300)


def test_sanitizers(library):
    done = child()
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) >= 6 * len(SANITIZED)


def test_the_sanitizers_find_a_write_past_the_end(library):
    done = child("planted")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "WRITE of size" in done.stderr


if __name__ == "__main__":
    sanitized_child(*sys.argv[1:])


# --- several sequences to a tile --------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
@pytest.mark.parametrize("frames", [3, 8])
def test_what_is_not_finite_stays_in_its_sequence(simt, frames, cls, which, value, dtype):
    """Several sequences share a tile, whose products meet the neighbours' rows with weight zero: zero times NaN."""
    case = Case("time", (7, 1, frames), cls)
    q, k, v = make_qkv(1, case.tokens, 2, 32, dtype)
    dout = make_dout(q)
    {"q": q, "k": k, "v": v, "dout": dout}[which][0, (cls != "none") + 2 * frames + 1, 1, 3] = value
    expected = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in (q, k, v)), dout.double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), with_gradients(run(case), q, k, v, dout), expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), name


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
@pytest.mark.parametrize("frames", [5, 8])
def test_statistics_of_short_sequences(simt, frames, cls, dtype):
    case = Case("time", (1, 3, frames), cls)
    q, k, v = make_qkv(2, case.tokens, 3, 32, dtype)
    view, first = view_of(case), cls != "none"
    members = frames + first
    stats = torch.full((2, 3, 3, members, 2), float("nan"))
    native_cuda.attention(q, k, v, torch.empty(q.shape, dtype=dtype), view, 0.3, None, stats=stats)
    for g in range(3):
        rows = [0] * first + list(range(first + g * frames, first + (g + 1) * frames))
        s = torch.einsum("bihd,bjhd->bhij", q[:, rows].double(), k[:, rows].double()) * 0.3
        top = s.max(-1).values
        exact = torch.stack([top, (s - top[..., None]).exp().sum(-1)], -1)
        asks = slice(int(cls == "key"), None)  # the class row is no query there
        torch.testing.assert_close(stats[:, :, g, asks].double(), exact[:, :, asks], rtol=1e-5, atol=1e-5)
