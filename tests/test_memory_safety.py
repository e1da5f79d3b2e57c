# SPDX-License-Identifier: Apache-2.0
"""Nothing is read or written outside the tensors: guard arena, NaN beside every row, AddressSanitizer and UBSan."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from arena import Arena, carved
from oracle import DTYPES, Case, check, device_of, make_dout, others_serve, same, with_gradients, with_weights

from timesformer_kernels import grid, grid_attention, native

ROOT = Path(__file__).resolve().parents[1]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
SHAPES = [  # case, head_dim
    pytest.param(Case("time", (1, 3, 1), "exclude"), 8, id="T1"),
    pytest.param(Case("time", (1, 3, 5), "exclude"), 20, id="T5-D20"),
    pytest.param(Case("time", (2, 2, 8), "exclude"), 64, id="T8-D64"),
    pytest.param(Case("time", (1, 2, 9), "none"), 7, id="T9-D7"),
    pytest.param(Case("time", (1, 2, 17), "key"), 63, id="T17-D63"),
    pytest.param(Case("time", (1, 1, 65), "none"), 24, id="T65"),
    pytest.param(Case("space", (1, 5, 2), "per_group"), 1, id="L6-D1"),
    pytest.param(Case("space", (4, 4, 3), "per_group"), 65, id="L17-D65"),
    pytest.param(Case("space", (7, 9, 2), "global", "time_major"), 40, id="L63-D40"),
    pytest.param(Case("space", (14, 14, 1), "per_group"), 16, id="L197"),
    pytest.param(Case("local", (2, 4, 3), "per_group"), 16, id="local"),
    pytest.param(Case("global", (2, 4, 6), "key"), 48, id="global"),
    pytest.param(Case("joint", (3, 3, 7), "per_group"), 257, id="L64-D257"),
]


def place(arena, x, gap, skew):
    """x with `gap` NaN elements behind every head's row, inside the arena."""
    padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=x.dtype, skew=skew * x.element_size())
    return padded[..., : x.shape[-1]].copy_(x)


@dtypes
@pytest.mark.parametrize("case, head_dim", SHAPES)
@pytest.mark.parametrize("gap, skew", [(0, 0), (3, 1)], ids=["dense", "gaps-misaligned"])
def test_guard_arena(engine, case, head_dim, dtype, gap, skew, monkeypatch):
    q, k, v = case.qkv(engine, 2, 2, head_dim, dtype)
    dout = make_dout(q)
    arena = Arena(device=q.device)
    guarded = [place(arena, x, gap, skew) for x in (q, k, v, dout)]
    call = lambda *x: grid_attention(*x, **case.options(backend=engine))  # noqa: E731
    with carved(monkeypatch, arena):
        got = with_gradients(call, *guarded)
    assert arena.damage() == []
    for name, x in zip(("out", "dq", "dk", "dv"), got, strict=True):
        assert x.isfinite().all(), f"{name}: NaN from outside a tensor, or a row that was never written"
    for x, y in zip(guarded, (q, k, v, dout), strict=True):
        assert torch.equal(x, y), "an input was written"
    if others_serve(engine, guarded):
        return
    expected = with_gradients(call, q, k, v, dout)
    assert all(same(engine, a, b) for a, b in zip(got, expected, strict=True))


def test_outputs_do_come_from_the_arena(fused, monkeypatch):
    """Guards the guard test: if the backend allocated elsewhere, its outputs would have no guards."""
    case, arena = Case("time", (1, 2, 4), "exclude"), Arena(device=device_of(fused))
    inputs = case.qkv(fused, 1, 1, 8)
    with carved(monkeypatch, arena):
        got = with_gradients(
            lambda *x: grid_attention(*x, **case.options(backend=fused)), *inputs, make_dout(inputs[0])
        )
    start = arena.buffer.data_ptr()
    for x in got:
        assert start <= x.data_ptr() < start + arena.buffer.numel()


def test_the_arena_finds_a_write_past_the_end():
    arena = Arena(1 << 16)
    x = arena.take(3, 5).fill_(1)
    assert arena.damage() == []
    x.as_strided((16,), (1,)).fill_(2)
    assert arena.damage()


def test_class_weights_are_read_in_bounds(engine):
    case = with_weights(Case("space", (3, 3, 5), "per_group"), 2)
    arena = Arena(device=device_of(engine))
    wide = arena.take(2, 9)[:, :5].copy_(case.weights)  # a strided view, NaN behind each row
    guarded = Case(case.scheme, case.grid, case.cls, weights=wide)
    q, k, v = case.qkv(engine, 2, 2, 8)
    check(lambda *x: grid_attention(*x, **guarded.options(backend=engine)), q, k, v, case)
    assert arena.damage() == []


@dtypes
@pytest.mark.parametrize("cls", ["exclude", "key"])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 8, 9, 11, 13, 16, 17], ids=lambda t: f"T{t}")
def test_nothing_survives_a_call_full_of_nan(engine, frames, cls, dtype):
    """Stack and workspace are dirty from the call before, of the longest sequence of the same kernel."""
    longest, case = Case("time", (1, 2, max(16, frames)), cls), Case("time", (1, 2, frames), cls)
    nan = torch.full((1, longest.tokens, 1, 8), float("nan"), dtype=dtype, device=device_of(engine))
    with_gradients(lambda *x: grid_attention(*x, **longest.options(backend=engine)), nan, nan, nan, nan)
    q, k, v = case.qkv(engine, 1, 1, 8, dtype)
    after = with_gradients(lambda *x: grid_attention(*x, **case.options(backend=engine)), q, k, v, make_dout(q))
    assert all(x.isfinite().all() for x in after)


# Sanitizers


def sanitizer_cases():
    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
    for parameters in SHAPES:
        case, head_dim = parameters.values
        view = grid.view(case.scheme, case.grid, case.cls, case.order)
        axes = [[*pairs, *[(1, 0)] * (3 - len(pairs))] for pairs in (view.groups, view.sequence)]
        numbers = [n for pairs in axes for pair in pairs for n in pair]
        for code in codes.values():
            for weights, biased in {(0, 0), (0, 1), (int(case.cls == "per_group"), 0)}:
                cls = grid.CLS_MODES.index(case.cls)
                sizes = weights, biased, 2, case.tokens, 2, head_dim
                yield " ".join(map(str, ["attention", code, cls, *sizes, *numbers]))


def sanitizer_steps():
    """Widths around every vector's, and some hundred rows, whose sums take several runs."""
    dtypes = ((0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 1, 0), (1, 1, 1), (2, 2, 0), (2, 2, 2), (3, 3, 3))
    for codes in dtypes:
        for dim in (*range(1, 34), 63, 64, 65, 130):
            yield " ".join(map(str, ["steps", *codes, 2, 3, dim, dim % 2, int(dim % 3 == 0)]))
        yield " ".join(map(str, ["steps", *codes, 2, 60, 19, 1, 1]))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The C++ sources and their driver, built with AddressSanitizer and UBSan."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++)")
    isas = native.build_info().get("_cpu", {}).get("isas") or {"baseline": []}  # as the build recorded them
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover"]  # -O0: an eighth of the time
    units = [(ROOT / "tests/native/sanitize.cpp", "driver", [])]
    have = [f"-DTSK_HAVE_{isa.upper()}=1" for isa in isas]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem in ("attention", "steps"):
            units += [(source, f"{source.stem}_{isa}", [f"-DTSK_ISA={isa}", *extra]) for isa, extra in isas.items()]
        else:
            units.append((source, source.stem, have))
    jobs = []
    for source, stem, extra in units:
        command = [compiler, *flags, *extra, "-c", str(source), "-o", str(folder / f"{stem}.o")]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        text = job.communicate()[1]
        assert job.returncode == 0, text
    program = folder / "sanitize"
    subprocess.run([compiler, *flags, *(str(folder / f"{stem}.o") for _, stem, _ in units), "-o", program], check=True)
    return program


def test_sanitizers(sanitized):
    """Every shape, dtype and class mode on every instruction set that was compiled and that this chip runs."""
    cases = [*sanitizer_cases(), *sanitizer_steps()]
    done = subprocess.run([sanitized], input="\n".join(cases), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = int(done.stdout.split()[0])
    assert runs >= len(cases) and runs % len(cases) == 0
