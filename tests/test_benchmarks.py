# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: every row computes its task, wrong ones are never timed, the report says what the JSON holds.

benchmarks/ runs as a user runs it, in a process of its own: nothing in tests/ imports from it.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F

from timesformer.benchmarking import core, gate, layouts, machine, peers, record, run, shapes, timing
from timesformer.benchmarking.half_block import HalfBlockProblem
from timesformer.benchmarking.problem import Task, sampled
from timesformer_kernels import native

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "report.py"


def python(*args, **env):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**inherited, **env}
    )


def report(*args):
    return python(REPORT, *args)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(result of all benchmarks on tiny shapes, its file)."""
    path = tmp_path_factory.mktemp("benchmarks") / "tiny.json"
    options = ["--tiny", "--benchmark-only", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    run = python("-m", "pytest", "benchmarks", *options, PYTEST_ADDOPTS="")
    assert run.returncode == 0, run.stdout + run.stderr  # every row was checked before it was timed
    return json.loads(path.read_text()), path


def infos(result, kind):
    return [bench["extra_info"] for bench in result["benchmarks"] if bench["extra_info"]["kind"] == kind]


def test_every_row_was_checked_and_records_its_circumstances(tiny):
    attention = infos(tiny[0], "attention")
    assert {"reference", "sdpa", "sdpa-no-copies", "eager", "copy"} <= {info["row"] for info in attention}
    assert {(i["dtype"], i["direction"]) for i in attention} == {
        (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "forward+backward")
    }
    for info in attention:
        assert info["threads"] == 1 and info["device"] == "cpu" and info["chip"] and info["torch"]
        assert info["peak_copy_GBps"] > 0 and info["peak_matmul_GFLOPps"] > 0 and info["noise"] >= 0
        if info["row"] != "copy":
            # Rounding leaves a trace: an error of exactly zero would mean that nothing was compared.
            assert 0 < info["max_err"] < 0.1
            assert (info["max_err_grad"] is not None) == (info["direction"] != "forward")
            assert info["deterministic"] is True and info["peak_bytes"] > 0 and 0 < info["floor_share"] < 1
            assert ("saved_bytes" in info) == (info["direction"] != "forward")


def test_flops_and_bytes_are_those_of_the_problem(tiny):
    """B=2, N=10, T=3, 2 heads of 8, one query or key more per frame in space attention for the class row."""
    for info in infos(tiny[0], "attention"):
        backward = info["direction"] != "forward"
        pairs = {"time attention": 10 * 3 * 3, "space attention": 3 * 11 * 11}[info["op"]]
        products = 7 if backward else 2
        assert info["flops"] == (0 if info["row"] == "copy" else products * 2 * 8 * pairs * 2 * 2)
        size = 2 * 31 * 2 * 8 * {"float32": 4, "bfloat16": 2}[info["dtype"]]
        assert info["bytes"] == size * (11 if backward else 4)


def test_model_rows_hold_memory_and_the_ratio_to_the_products(tiny):
    forward = {i["row"]: i for i in infos(tiny[0], "model") if i["direction"] == "forward"}
    assert {"ours-reference", "huggingface", "products"} <= forward.keys()
    products = forward["products"]["interleaved_median_ms"]
    for row, info in forward.items():
        assert info["ratio_to_products"] == pytest.approx(info["interleaved_median_ms"] / products)
        assert row == "products" or info["peak_bytes"] > 4 * 17 * 32  # one activation at least
    assert len({i["row"] for i in infos(tiny[0], "overhead")}) >= 2


def test_every_step_is_checked_and_timed_beside_its_bytes(tiny):
    found = {}
    for info in infos(tiny[0], "step"):
        found.setdefault((info["op"], info["dtype"], info["direction"]), {})[info["row"]] = info
    assert len(found) == 3 * 2 * 2
    for (op, _, direction), rows in found.items():
        assert {"torch", "copy"} <= rows.keys() and ("cpp" in rows or not native.library()[0])
        size = 2 * 65 * (128 if op == "bias gelu" else 32) * {"float32": 4, "bfloat16": 2}[rows["copy"]["dtype"]]
        passes = {"bias gelu": (2, 5), "add layer norm": (4, 8), "embedding": (3.5, 9)}[op][direction != "forward"]
        assert {info["bytes"] for info in rows.values()} == {passes * size}
        assert all(0 < info["max_err"] < 0.1 for row, info in rows.items() if row != "copy")


def test_what_comes_before_the_model_is_timed_beside_it(tiny):
    rows = {info["row"]: info["interleaved_median_ms"] for info in infos(tiny[0], "video")}
    assert rows.keys() == {"consecutive", "spread", "convert", "model"} and min(rows.values()) > 0
    assert rows["spread"] > rows["convert"]  # it decodes some 200 frames more


def test_the_demo_is_timed_from_its_start(tiny):
    (info,) = infos(tiny[0], "demo")
    assert info["row"] == "demo" and info["interleaved_median_ms"] > 500  # what importing torch takes alone


def test_every_level_has_rows_of_ours_and_of_others(tiny):
    found = {}
    for kind in ("module", "model"):
        for info in infos(tiny[0], kind):
            found.setdefault((info["op"], info["direction"]), set()).add(info["row"])
            assert info["row"] == "products" or 0 < info["max_err"] < 1e-3
    both = ("forward", "forward+backward")
    assert found.keys() == {
        *(("half-block", d) for d in both),
        *(("block", d) for d in both),
        ("TimeSformer", "forward"),
        ("TimeSformer training", "step"),
    }
    for (op, _), rows in found.items():
        assert {"ours", "products", "sdpa" if op == "half-block" else "huggingface"} <= rows


def test_the_file_can_be_published(tiny):
    result, path = tiny
    assert "node" not in result["machine_info"]
    assert str(path.parent) not in json.dumps(result) and "tiny.json" in result["machine_info"]["command"]


def test_the_report_of_a_real_file(tiny):
    run = report(tiny[1])
    assert run.returncode == 0, run.stderr
    groups = {bench["group"] for bench in tiny[0]["benchmarks"]}
    lines = run.stdout.splitlines()
    assert (
        sum(line.startswith("| ---") for line in lines) == sum(line.startswith("**") for line in lines) == len(groups)
    )


# A fabricated result, with numbers that divide easily.


def test_a_capture_that_fails_tells_the_first_error(monkeypatch):
    """The end of a capture raises, too, and would hide what spoilt it."""

    class Stand(contextlib.nullcontext):
        wait_stream = synchronize = lambda *_: None

    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, stand in dict(
        Stream=Stand, stream=Stand, current_stream=Stand, synchronize=Stand, CUDAGraph=Stand, graph=graph
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand)
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 4:  # after three to warm up
            raise ValueError("not permitted while a stream is captured")

    with pytest.raises(ValueError, match="not permitted"):
        timing.capture(call)
    with pytest.raises(RuntimeError, match="previous error"):
        timing.capture(lambda: None)


def bench(group, row, median_ms, **info):
    facts = dict(row=row, dtype="float32", direction="forward", chip="Chip 9000", isa="avx2", threads=1, torch="9.9")
    stats = {"median": median_ms / 2000} if median_ms else {}  # seconds; warm calls take half the time
    return {
        "name": row,
        "group": group,
        "stats": stats,
        "extra_info": {**facts, "interleaved_median_ms": median_ms, **info},
    }


def fabricated(tmp_path, *benchmarks):
    path = tmp_path / "result.json"
    result = {
        "machine_info": {"command": "pytest benchmarks/ --benchmark-only"},
        "datetime": "2031-02-03T04:05:06+00:00",
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(result))
    return path


def rendered(path):
    """(captions, {first cell: other cells} over all tables)."""
    run = report(path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if line.startswith("| ")]
    return [line for line in lines if line.startswith("**")], {row[0]: row[1:] for row in cells}


def test_attention_table(tmp_path):
    common = dict(kind="attention", op="time attention", shape="8x224: B=1", max_err=1e-6, max_err_grad=None)
    times = {"cpp": 2.0, "sdpa": 9.0, "eager": 15.0, "copy": 1.5}
    path = fabricated(tmp_path, *(bench("g", row, ms, **common) for row, ms in times.items()))
    (caption,), rows = rendered(path)
    for fact in ("Time attention, forward, float32", "8x224: B=1", "Chip 9000", "avx2", "1 thread;", "torch 9.9"):
        assert fact in caption
    assert "2031-02-03" in caption and "`pytest benchmarks/ --benchmark-only`" in caption
    assert rows["cpp"] == ["2.00", "4.50", "7.50", "75%", "1.00", "4.50", "7.50", "75%", "1.0e-06"]
    assert rows["sdpa"] == ["9.00", "1.00", "1.67", "17%", "4.50", "1.00", "1.67", "17%", "1.0e-06"]


def test_model_and_overhead_tables(tmp_path):
    common = dict(kind="model", op="TimeSformer-B", shape="8x224: B=1")
    path = fabricated(
        tmp_path,
        bench("m", "ours", 105.0, peak_bytes=30 * 2**20, **common),
        bench("m", "huggingface", 210.0, peak_bytes=60 * 2**20, **common),
        bench("m", "products", 100.0, peak_bytes=None, **common),
        bench("o", "cpp", 0.0125, kind="overhead", op="overhead of time attention", shape="2x32"),
    )
    captions, rows = rendered(path)
    assert len(captions) == 2
    assert rows["ours"] == ["105.0", "1.05", "0.50", "30.0", "50%"]
    assert rows["products"] == ["100.0", "1.00", "0.48", "–", "–"]
    assert rows["cpp"] == ["12.5"]


def test_video_and_step_tables(tmp_path):
    clip = dict(kind="video", op="a clip of a video", shape="8 frames")
    step = dict(kind="step", op="add layer norm", shape="8x224: 1 x 1569 rows of 768", max_err=2e-6)
    path = fabricated(
        tmp_path,
        bench("v", "spread", 30.0, **clip),
        bench("v", "model", 120.0, **clip),
        bench("s", "triton", 2.0, **step),
        bench("s", "torch", 5.0, **step),
        bench("s", "copy", 1.5, kind="step", op="add layer norm", shape="8x224: 1 x 1569 rows of 768"),
        bench("d", "demo", 21_040.0, kind="demo", op="demo", shape="two videos"),
    )
    _, rows = rendered(path)
    assert rows["demo"] == ["21.0"]
    assert rows["spread"] == ["30.0", "25.0%"] and rows["model"] == ["120.0", "100.0%"]
    assert rows["triton"] == ["2.00", "2.50", "75%", "1.00", "2.50", "75%", "2.0e-06", "–"]


def test_summary(tmp_path):
    common = dict(kind="attention", op="space attention", shape="8x224: B=1")
    benchmarks = [bench("g", "cpp", 2.0, **common), bench("g", "sdpa", 5.0, **common)]
    benchmarks += [bench("m", "ours", 105.0, kind="model", op="TimeSformer-B", shape="8x224: B=1")]
    step = dict(kind="step", op="bias gelu", shape="8x224: 1 x 1569 rows of 3072")
    benchmarks += [bench("s", "cpp", 2.0, **step), bench("s", "torch", 5.0, **step), bench("s", "copy", 1.5, **step)]
    run = python(REPORT, "--summary", fabricated(tmp_path, *benchmarks))
    assert "| space attention, forward, float32 | 2.00 | 2.50 | – | – | 1.00 | 2.50 | – | – |" in run.stdout, run.stderr
    assert "|  | cold ms | x sdpa | x eager | copy | warm ms | x sdpa | x eager | copy |" in run.stdout
    assert "Chip 9000" in run.stdout and "| ours | 105.0 |" in run.stdout
    assert "**`cpp`, the other steps.** 8x224: 1 x 1569 rows of 3072" in run.stdout
    assert "| bias gelu, forward, float32 | 2.00 | 2.50 | 75% | 1.00 | 2.50 | 75% |" in run.stdout
    run = python(REPORT, "--summary", fabricated(tmp_path, benchmarks[1]))
    assert run.returncode == 2 and "'cpp'" in run.stderr


def test_a_missing_row_leaves_a_dash(tmp_path):
    common = dict(kind="attention", op="time attention", shape="8x224: B=1")
    rows = rendered(fabricated(tmp_path, bench("g", "cpp", 2.0, **common)))[1]
    assert rows["cpp"] == ["2.00", "–", "–", "–", "1.00", "–", "–", "–"]


def gpu(tmp_path, **changes):
    """A made-up result of a GPU: 2 ms or less a call, one peer that could not run."""
    common = dict(kind="attention", op="time attention", shape="8x224: B=8, N=196, T=8, 12 heads of 64", device="cuda")
    common.update(dtype="bfloat16", frames=8, locations=196, batch=8, floor_ms=0.9, floor_share=0.45, noise=0.1)
    common.update(flops=10**9, bytes=9 * 10**8, peak_copy_GBps=1000.0, deterministic=True, saved_bytes=0, **changes)
    times = {"triton": 2.0, "sdpa": 8.0, "sdpa-cudnn": 4.0, "sdpa-cudnn-no-copies": 2.1, "copy": 0.9}
    rows = [bench("g", row, ms, graph_median_ms=ms / 2, peak_bytes=2**20, **common) for row, ms in times.items()]
    rows.append(bench("g", "sdpa-math", None, reason="OutOfMemoryError: no", **common))
    return fabricated(tmp_path, *rows)


def test_tables_of_a_gpu(tmp_path):
    run = report(gpu(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "| triton | 2.000 | 1.00 | 1.000 | 1.000 | 45% | 1.0 | 0.0 |" in run.stdout
    assert "| sdpa-cudnn-no-copies | 2.100 | ~1.05 |" in run.stdout  # less than the noise of 10 %
    assert "| sdpa-math" not in run.stdout and "Not measured: `sdpa-math`: OutOfMemoryError: no" in run.stdout
    assert "1 thread" not in run.stdout and "noise 10.0%" in run.stdout
    run = report("--summary", gpu(tmp_path))
    line = "8x224: B=8, forward, bfloat16 | 2.000 | 1.000 | 90% | 4.00 | sdpa-cudnn | 2.00 | 1.0 | 100% |"
    assert f"| time attention, {line}" in run.stdout, run.stderr


def test_goals_are_judged_by_the_copy_of_the_same_process(tmp_path):
    run = report("--goals", gpu(tmp_path))
    assert "time attention, forward, 8x224: B=8, N=196, T=8 | 92% of the copy | 90% | missed by 2% |" in run.stdout
    run = report("--goals", gpu(tmp_path, op="space attention"))
    assert "80% of the copy | 90% | reached |" in run.stdout, run.stderr
    assert report("--goals", gpu(tmp_path, dtype="float32")).returncode == 2


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    path = gpu(tmp_path)
    result = json.loads(path.read_text())
    for frames in (16, 32):
        for row in json.loads(path.read_text())["benchmarks"]:
            row["extra_info"]["frames"] = frames
            result["benchmarks"].append({**row, "group": f"g{frames}"})
    path.write_text(json.dumps(result))
    run = report(path, "--plots", tmp_path / "plots")
    names = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert names == ["result-memory.png", "result-time-attention.png", "result-time.png"], run.stderr
    assert all((tmp_path / "plots" / name).stat().st_size > 10_000 for name in names)


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("{}", "holds no benchmarks"),
        ('{"benchmarks": [{"name": "x", "group": "g", "extra_info": {"kind": "attention"}}]}', "x lacks op, row"),
    ],
    ids=["absent", "broken", "empty", "foreign"],
)
def test_bad_files_are_one_clear_error(tmp_path, text, reason):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    run = report(path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: file:") and reason in run.stderr and "Traceback" not in run.stderr


# --- the package below: timesformer.benchmarking ---------------------------------------------------------------------


def job(rows=None):
    facts = {"device": "cpu", "chip": "test", "threads": 1, "torch": torch.__version__}
    protocol = run.Protocol(0.0, least=2, most=2, warmup=1, costs=False)
    ceilings = machine.Ceilings("cpu", small=True)
    return run.Run(record.Record(None, "command", facts), facts, ceilings, protocol, "cpu", rows=rows)


def attention(scheme="time", shape=shapes.TINY, dtype=torch.float32):
    return core.AttentionProblem(scheme, shape, dtype)


def by_oracle(problem, row):
    """[out, dqkv] of a row, and what the tests' oracle says."""
    shape = problem.shape
    case = oracle.Case(problem.scheme, (shape.height, shape.width, shape.frames), shapes.CLS[problem.scheme])
    leaf = problem.packed.detach().requires_grad_()
    with torch.enable_grad():
        out = problem.task(row).run(leaf)
        (grad,) = torch.autograd.grad(out, leaf, problem.dout)
        wide = problem.packed.double().requires_grad_()
        exact = oracle.attention(*wide.unbind(2), case)
        (exact_grad,) = torch.autograd.grad(exact, wide, problem.dout.double())
    return (out, exact), (grad, exact_grad)


STOCK = [name for name, peer in peers.PEERS.items() if not peer.full]


@pytest.mark.parametrize("scheme", shapes.CLS)
@pytest.mark.parametrize("row", ["cpp", "reference", *STOCK])
def test_rows_compute_the_task(monkeypatch, scheme, row):
    install_fakes(monkeypatch)
    problem = attention(scheme)
    if row not in ("flash-attn", "flash-attn-varlen", "xformers") and (reason := problem.why_not(row)):
        pytest.skip(f"{row}: {reason}")
    for got, exact in by_oracle(problem, row):
        assert got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", ["sdpa", "sdpa-packed", "eager"])
def test_a_row_without_copies_runs_the_core_of_the_one_with(row):
    problem = attention("space")
    whole, bare = problem.task(row), problem.task(row + core.SUFFIX)
    layout = peers.PEERS[row].layout
    restored = layout.restore(bare.run(*bare.operands), "space", problem.shape)
    torch.testing.assert_close(restored, whole.run(*whole.operands))
    assert all(x.is_contiguous() for x in bare.operands) and bare.dout.shape == bare.run(*bare.operands).shape


@pytest.mark.parametrize("row", ["cpp", "reference", "eager", "eager-no-copies", "sdpa-packed"])
def test_what_is_timed_is_what_is_checked(row):
    problem = attention("time")
    if reason := problem.why_not(row):
        pytest.skip(f"{row}: {reason}")
    task = problem.task(row)
    leaves, _ = task.leaves()
    out = task.run(*leaves)
    grads = torch.autograd.grad(out, leaves, task.dout)
    with torch.no_grad():
        torch.testing.assert_close(problem.timed(row, "forward")(), out)
    for direction in ("backward", "forward+backward"):
        torch.testing.assert_close(problem.timed(row, direction)(), grads)


def install_fakes(monkeypatch):
    """flash_attn and xformers with the documented signatures, by plain attention over the layouts they document."""

    def attend(q, k, v):  # [B, L, H, D]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def qkvpacked(qkv):
        assert qkv.dim() == 5 and qkv.shape[2] == 3
        return attend(*qkv.unbind(2))

    def varlen(qkv, cu_seqlens, max_seqlen):
        assert qkv.dim() == 4 and cu_seqlens.dtype == torch.int32 and cu_seqlens[-1] == len(qkv)
        ends = cu_seqlens.tolist()
        assert max(b - a for a, b in zip(ends, ends[1:], strict=False)) == max_seqlen
        return torch.cat([qkvpacked(qkv[None, a:b])[0] for a, b in zip(ends, ends[1:], strict=False)])

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, lengths):
            made = cls()
            made.lengths = lengths
            return made

    def memory_efficient_attention(q, k, v, attn_bias):
        assert q.dim() == 4 and len(q) == 1 and sum(attn_bias.lengths) == q.shape[1]
        parts = zip(*(x.split(attn_bias.lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 1)

    made = {
        "flash_attn": dict(flash_attn_qkvpacked_func=qkvpacked, flash_attn_varlen_qkvpacked_func=varlen),
        "xformers": {},
        "xformers.ops": dict(memory_efficient_attention=memory_efficient_attention),
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": dict(BlockDiagonalMask=BlockDiagonalMask),
    }
    for name, members in made.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


@pytest.mark.parametrize("one, count", [(8, 196), (96, 5), (197, 3), (128, 2)])
def test_the_mask_of_flex_attention_is_block_diagonal(one, count):
    mask = peers.block_diagonal(one * count, one, "cpu")
    sequence = torch.arange(one * count) // one
    allowed = F.pad(sequence[:, None] == sequence, (0, -len(sequence) % peers.TILE, 0, -len(sequence) % peers.TILE))
    needed = allowed.unflatten(1, (-1, peers.TILE)).unflatten(0, (-1, peers.TILE)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)  # every block that holds a pair, and no other
    i, j = torch.meshgrid(torch.arange(one * count), torch.arange(one * count), indexing="ij")
    assert torch.equal(mask.mask_mod(0, 0, i, j), sequence[:, None] == sequence)


@pytest.mark.parametrize("frames, rows", [(8, 112), (16, 112), (32, 128), (64, 128), (96, 96)])
def test_packing_fills_128_rows_as_far_as_196_locations_divide(frames, rows):
    assert layouts.Grouped(packed=True).rows("time", shapes.clip(frames, 224)) == rows
    reason = peers.PEERS["sdpa-packed"].why_not("time", shapes.clip(frames, 224), "cpu")
    assert (reason is None) == (rows > frames)


def corrupted(problem, row, damage):
    """The problem with a row whose output is damaged."""
    task = problem.task(row)
    problem._tasks[row] = Task(lambda packed: damage(task.run(packed)), task.operands, task.dout)
    return problem


DAMAGES = {
    "class row": lambda o: torch.cat([o[:, :1] + 1, o[:, 1:]], 1),
    "last token": lambda o: torch.cat([o[:, :-1], 0 * o[:, -1:]], 1),
    "frames reversed": lambda o: torch.cat([o[:, :1], o[:, 1:].flip(1)], 1),
    "NaN": lambda o: torch.cat([o[:, :1], o[:, 1:2] * float("nan"), o[:, 2:]], 1),
    "heads swapped": lambda o: o.flip(2),
    "second clip lost": lambda o: torch.cat([o[:1], o[:1]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_row_is_recorded_and_never_timed(damage, dtype):
    work, problem = job(), corrupted(attention("space", dtype=dtype), "sdpa", damage)
    timed = []
    problem.timed = lambda row, direction, real=problem.timed: timed.append(row) or real(row, direction)
    work.group(problem, "forward")
    (rows,) = work.record.groups().values()
    assert rows["sdpa"]["interleaved_median_ms"] is None and "sdpa" not in timed
    assert "off by" in rows["sdpa"]["reason"] or "not finite" in rows["sdpa"]["reason"]
    assert rows["eager"]["interleaved_median_ms"] > 0 and "eager" in timed


def test_a_wrong_gradient_is_found():
    problem = attention("time")
    task = problem.task("sdpa")
    halved = Task(lambda x: task.run(x) / 2 + task.run(x).detach() / 2, task.operands, task.dout)
    problem._tasks["sdpa"] = halved
    assert problem.check("sdpa", "forward")["out"] < 1e-5
    with pytest.raises(gate.WrongResult, match="dqkv"):
        problem.check("sdpa", "forward+backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_are_compared_too(dtype):
    problem = HalfBlockProblem(replace(shapes.TINY, batch=3), dtype)  # of which two clips are compared
    for row in ("ours", "eager", "sdpa"):
        assert problem.check(row, "forward+backward").keys() == {"out", "dx", "dweights"}
    task = problem.task("eager")
    problem._tasks["eager"] = Task(lambda x: task.run(x.roll(1, 1)), task.operands, task.dout, task.parameters)
    with pytest.raises(gate.WrongResult):
        problem.check("eager", "forward")


def test_every_clip_and_head_can_be_sampled():
    assert sampled(3, 5) == [0, 1, 2] and sampled(1, 24) == [0]
    many = sampled(96, 24)
    assert len(many) == 24 and many[0] == 0 and many[-1] == 95
    assert {pair // 12 for pair in many} == set(range(8)) and len({pair % 12 for pair in many}) > 6
