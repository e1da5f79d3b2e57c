# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: every row computes its task, wrong ones are never timed, the report says what the JSON holds.

benchmarks/ runs as a user runs it, in a process of its own: nothing in tests/ imports from it.
"""

import contextlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from reports import python, report

from timesformer.benchmarking import core, gate, layouts, machine, peers, record, run, shapes, timing
from timesformer.benchmarking.half_block import HalfBlockProblem
from timesformer.benchmarking.problem import Task, sampled
from timesformer_kernels import native


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


def test_the_profile_of_a_forward(tmp_path):
    out = tmp_path / "profile.json"
    run = python("benchmarks/profile_model.py", "--img-size", "32", "--frames", "2", "--out", out)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    parts = dict(found["ms"])
    whole = parts.pop("forward")
    assert parts.keys() == {"products", "bias copies", "rest"} and all(0 <= part < whole for part in parts.values())
    assert min(parts["products"], parts["rest"]) > 0
    assert sum(parts.values()) == pytest.approx(whole, abs=0.1)
    assert found["threads"] == 1 and "--frames 2 --threads 1" in found["command"]


# --- the package below: timesformer.benchmarking ---------------------------------------------------------------------


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
