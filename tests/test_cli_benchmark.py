# SPDX-License-Identifier: Apache-2.0
"""`timesformer benchmark`, and how it measures: turns, caches, graphs, and a file that survives what happens."""

import json
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from timesformer.benchmarking import core, machine, record, run, shapes, timing
from timesformer.benchmarking.problem import Task
from timesformer.cli import _parser, benchmark, main

FACTS = {"device": "cpu", "chip": "test", "threads": 1, "torch": torch.__version__}


def job(path=None, seconds=0.0, **options):
    protocol = run.Protocol(seconds, least=2, most=2, warmup=1, costs=False)
    kept = record.Record(path, "command", FACTS, options.pop("resume", False))
    return run.Run(kept, FACTS, machine.Ceilings("cpu", small=True), protocol, "cpu", **options)


def attention(scheme="time", shape=shapes.TINY, dtype=torch.float32):
    return core.AttentionProblem(scheme, shape, dtype)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_take_turns_and_set_up_outside_the_window():
    log = []
    slow = timing.Timed(lambda: log.append("run"), setup=lambda: time.sleep(0.01) or ())
    times = timing.interleave({"a": slow, "b": lambda: log.append("b")}, seconds=0.0, least=4, warmup=0)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 4, "b": 4}
    assert max(times["a"]) < 0.01  # the pause is not in it
    rounds = [log[i : i + 2] for i in range(0, 8, 2)]
    assert all(sorted(pair) == ["b", "run"] for pair in rounds) and len({tuple(pair) for pair in rounds}) == 2


def test_noise_and_quantiles():
    assert timing.noise([1.0, 2.0, 3.0], [2.2, 2.2]) == pytest.approx(0.1)
    found = timing.summary([0.005, 0.001, 0.002, 0.003, 0.004, 0.1])
    assert found["median_ms"] == pytest.approx(3.5) and found["min_ms"] == pytest.approx(1.0)
    assert (found["q20_ms"], found["q80_ms"]) == (pytest.approx(2.0), pytest.approx(5.0)) and found["rounds"] == 6


@pytest.fixture
def cuda(monkeypatch):
    """Events and buffers that write down what happens; time passes by one millisecond with every step."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return float(end.at - self.at)

    class Buffer:
        def fill_(self, value):
            log.append("write")

        def amax(self):
            log.append("read")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
    monkeypatch.setattr(timing, "FLUSHED", 1024)
    watch = timing.CudaWatch("cpu")
    assert watch.written.nbytes == watch.read.nbytes == 2 * 2**20
    watch.written = watch.read = Buffer()
    return SimpleNamespace(log=log, watch=watch)


def test_a_cold_sample_empties_the_cache_before_the_first_event(cuda):
    call = timing.Timed(lambda: cuda.log.append("run"), setup=lambda: cuda.log.append("setup") or ())
    times = timing.interleave({"it": call}, seconds=0.0, watch=cuda.watch, warmup=0, least=2)
    once = ["setup", "write", "read", "event", "run", "event", "synchronize"]
    assert cuda.log == ["synchronize", *once, *once] and times["it"] == [pytest.approx(2e-3)] * 2


def test_a_warm_sample_follows_the_same_call(cuda):
    call = timing.Timed(lambda: cuda.log.append("run"), setup=lambda: cuda.log.append("setup") or ())
    timing.interleave({"it": call}, seconds=0.0, watch=cuda.watch, warmup=0, least=1, cold=False)
    assert cuda.log[1:] == ["setup", "run", "setup", "event", "run", "event", "synchronize"]


def test_samples_of_a_round_are_not_waited_for_one_by_one(cuda):
    calls = {name: lambda name=name: cuda.log.append(name) for name in "abc"}
    timing.interleave(calls, seconds=0.0, watch=cuda.watch, warmup=0, least=2)
    assert cuda.log.count("synchronize") == 3


class Graph:
    def __init__(self, replay):
        self.replay = replay


def test_a_replay_that_leaves_the_poison_is_found():
    out, expected = torch.ones(4), torch.full((4,), 2.0)
    assert timing.replay_error(Graph(lambda: out.copy_(expected)), (out,), (expected,)) == 0.0
    assert timing.replay_error(Graph(lambda: out.copy_(1.5 * expected)), (out,), (expected,)) == pytest.approx(0.5)
    out.copy_(expected)  # an earlier, right result must not hide it
    assert math.isnan(timing.replay_error(Graph(lambda: None), (out,), (expected,)))


def test_graph_rows_are_compared_and_timed(monkeypatch):
    """On a graph that replays the call, with the processor's clock; the row whose graph lies is not timed by it."""

    def capture(call):
        outputs = timing.tensors(call())

        def replay():
            for x, y in zip(outputs, timing.tensors(call()), strict=True):
                x.copy_(y if honest(call) else 0 * y)

        return Graph(replay), outputs

    work, problem = job(rows=("cpp", "sdpa", "eager")), attention()
    liars = []
    real = problem.timed
    problem.timed = lambda row, direction: liars.append(made := real(row, direction)) or made
    honest = lambda call: call is not liars[1]  # noqa: E731
    monkeypatch.setattr(run, "capture", capture)
    monkeypatch.setattr(run, "GRAPH_LIMIT_MS", math.inf)  # however busy the machine is
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    work._watch, work.device = timing.CpuWatch(), "cuda"
    work.group(problem, "forward")
    (rows,) = work.record.groups().values()
    assert rows["cpp"]["graph_median_ms"] > 0 and rows["eager"]["graph_warm_median_ms"] > 0
    assert rows["cpp"]["graph_noise"] >= 0
    assert "graph_median_ms" not in rows["sdpa"] and "differs by 1.0e+00" in rows["sdpa"]["graph_reason"]
    assert rows["sdpa"]["interleaved_median_ms"] > 0


# --- the run and its file --------------------------------------------------------------------------------------------


def test_the_file_is_whole_after_every_row_and_resumed(tmp_path):
    path = tmp_path / "run.json"
    seen = []

    def step(text):
        seen.append(len(json.loads(path.read_text())["benchmarks"]) if path.exists() else 0)

    rows = ("sdpa", "sdpa-efficient", "sdpa-cudnn")
    job(path, step=step, rows=rows).group(attention(), "forward")
    result = json.loads(path.read_text())
    assert seen[-1] == 0 and len(result["benchmarks"]) == 1  # of sdpa alone: the others are not in the quick set
    job(path, step=step, rows=rows, full=True, resume=True).group(attention(), "forward")
    again = json.loads(path.read_text())
    assert len(again["benchmarks"]) == 3 and again["benchmarks"][0] == result["benchmarks"][0]
    assert [b["extra_info"].get("reason") for b in again["benchmarks"]] == [None, *["no kernel for cpu"] * 2]
    path.write_text('{"benchmarks": [{}]}')
    with pytest.raises(ValueError, match="not a record to resume"):
        job(path, resume=True)


def test_a_lost_device_is_recorded_and_passed_on(tmp_path, monkeypatch):
    """The row that ended the device keeps its reason; a new process measures the others."""
    path = tmp_path / "run.json"
    problem = attention()

    def fail(packed):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    problem._tasks["sdpa"] = Task(fail, (problem.packed,), problem.dout)
    work = job(path, rows=("sdpa", "eager"))
    work.device = "cuda"
    with pytest.raises(run.DeviceLost, match="illegal memory access"):
        work.problem(problem, ("forward",))
    (rows,) = work.record.groups().values()
    assert list(rows) == ["sdpa"] and "illegal memory access" in rows["sdpa"]["reason"]
    job(path, rows=("sdpa", "eager"), resume=True).problem(attention(), ("forward",))
    rows = {b["extra_info"]["row"]: b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]}
    assert rows["sdpa"]["interleaved_median_ms"] is None and rows["eager"]["interleaved_median_ms"] > 0


def test_no_group_is_begun_after_the_deadline():
    work = job(deadline=time.monotonic() - 1, rows=("eager",))
    work.problem(attention(), ("forward", "backward"))
    assert not work.record.groups()
    left = work.record.result["machine_info"]["left_out"]
    assert left == ["time-attention tiny B=2 float32 forward", "time-attention tiny B=2 float32 backward"]


def test_a_row_that_fails_while_it_is_timed_is_a_row_with_a_reason(monkeypatch):
    work = job(rows=("eager",))
    monkeypatch.setattr(run, "interleave", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no more memory")))
    work.group(attention(), "forward")
    (rows,) = work.record.groups().values()
    assert rows["eager"]["reason"] == "RuntimeError: no more memory"


def test_the_interpreter_is_not_timed(monkeypatch):
    from timesformer.benchmarking.problem import own_backends
    from timesformer_kernels import registry

    fake = SimpleNamespace(why_not=lambda *args: None, auto_skips=frozenset({"cpu"}))
    plain = SimpleNamespace(why_not=lambda *args: None, auto_skips=frozenset())
    monkeypatch.setattr(registry, "available_backends", lambda: ("triton", "other"))
    monkeypatch.setattr(registry, "get", {"triton": fake, "other": plain}.get)
    found = own_backends("cpu", torch.float32, 64)
    assert "interpreter" in found["triton"] and found["other"] is None
    assert own_backends("cuda", torch.float32, 64) == {"triton": None, "other": None}


def test_the_largest_batch_is_recorded():
    work = job()
    work.largest_batch(lambda n: attention(shape=shapes.Shape("x", 2, 1, 2, 1, 8, n)), "forward", "cpp", 4)
    ((group, rows),) = work.record.groups().items()
    assert group.startswith("largest batch of time-attention") and rows["cpp"]["largest"] == 4


# --- the command -----------------------------------------------------------------------------------------------------

QUICK = ["benchmark", "--tiny", "--device", "cpu", "--scheme", "time", "--direction", "forward"]


@pytest.fixture(autouse=True)
def unchanged_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_table(capsys):
    assert main([*QUICK, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    title, header, first, *_ = out.splitlines()
    assert title.startswith("time-attention tiny float32 forward  (floor ") and "noise" in title
    assert header.split("  ") and "cold ms" in header and "of floor" in header and "graph ms" not in header
    assert first.split()[0] == "cpp" or first.split()[0] == "reference"  # without a compiler
    assert "copy" in out and "triton: not measured: " in out and "saved MiB" not in out


@pytest.mark.parametrize("level", ["half-block", "block", "model", "train"])
def test_levels(level, capsys):
    if level != "half-block":
        pytest.importorskip("transformers")
    arguments = [arg for arg in QUICK if arg not in ("--scheme", "time")]
    assert main([*arguments, "--level", level, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["benchmarks"]
    rows = {row["extra_info"]["row"]: row["extra_info"] for row in rows}
    assert rows["ours"]["backend"] in ("cpp", "reference") and rows["ours"]["interleaved_median_ms"] > 0
    assert rows["ours"]["direction"] == ("step" if level == "train" else "forward")
    assert rows["products"]["flops"] < rows["ours"]["flops"] and rows["ours"]["max_err"] < 1e-3


def test_the_file_is_what_the_report_reads(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert main([*QUICK, "--rows", "sdpa", "copy", "--out", str(path), "--batch-size", "1", "2"]) == 0
    result = json.loads(path.read_text())
    assert [row["group"] for row in result["benchmarks"]].count("time-attention tiny B=2 float32 forward") == 2
    assert result["machine_info"]["command"].startswith("timesformer benchmark --level core --scheme time --frames 8 ")
    assert str(tmp_path) not in json.dumps(result)
    before = result["benchmarks"]
    assert main([*QUICK, "--rows", "sdpa", "eager", "--out", str(path), "--resume", "--batch-size", "1"]) == 0
    after = json.loads(path.read_text())["benchmarks"]
    assert after[: len(before)] == before and [row["extra_info"]["row"] for row in after[len(before) :]] == ["eager"]


def test_one_backend_and_the_largest_batch(capsys):
    assert main([*QUICK, "--backend", "reference", "--rows", "reference", "--largest-batch", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "             largest  what stops it",
        "  reference        4  not tried further",
    ]


def test_the_budget_leaves_tables_out_and_says_so(capsys):
    assert main([*QUICK, "--budget", "0"]) == 1
    assert "left out, --budget was spent: time-attention tiny float32 forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--rows", "flashier"], "--rows: got flashier, expected some of cpp"),
        (["--backend", "opencl"], "--backend: got 'opencl'"),
        (["--resume"], "--resume: needs --out"),
        (["--img-size", "225"], "--img-size: got 225, expected a multiple of 16"),
        (["--seconds", "-1"], "--seconds: got -1.0, expected at least 0"),
        (["--budget", "nan"], "--budget: got nan, expected at least 0"),
        (["--level", "attention"], "invalid choice: 'attention'"),
        (["--frames", "0"], "got 0, expected at least 1"),
    ],
)
def test_wrong_usage(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert reason in err or "expected some of" in reason and "--rows: got flashier" in err


def test_cuda_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["benchmark", "--device", "cuda"])
    assert "--device: got cuda" in capsys.readouterr().err


def test_plot_says_what_to_install_before_it_measures(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark, "_measure", lambda *args: pytest.fail("measured"))
    assert main([*QUICK, "--plot", str(tmp_path / "x.png")]) == 1
    assert "pip install 'timesformer-kernels[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("frames", [[8], [8, 16]], ids=["bars", "lines"])
def test_plots(frames, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    real = benchmark._sizes

    def sizes(args, level):  # --tiny has one length
        (tiny,) = real(args, level)
        return [lambda batch, t=t: replace(tiny(batch), name=f"{t}", frames=t // 4) for t in frames]

    monkeypatch.setattr(benchmark, "_sizes", sizes)
    assert main([*QUICK, "--plot", str(tmp_path / "times.png")]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["times.png"] if len(frames) == 1 else ["times-memory.png", "times.png"])


def test_a_lost_device_goes_on_in_a_new_process(tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "run.json", []

    def lose(*args):
        raise run.DeviceLost("sdpa: illegal memory access")

    monkeypatch.setattr(benchmark, "_measure", lose)

    def execute(path, parts):
        calls.append(parts)
        raise SystemExit(0)  # this process is no more

    monkeypatch.setattr(benchmark.os, "execv", execute)
    arguments = [*QUICK, "--out", str(path), "--rows", "sdpa", "--budget", "100", "--json"]
    with pytest.raises(SystemExit):
        main(arguments)
    ((_, module, name, *again),) = calls
    assert (module, name) == ("-m", "timesformer.cli") and {"--resume", "--json"} <= set(again)
    assert again[again.index("--out") + 1] == str(path) and "illegal memory access" in capsys.readouterr().err
    budget = again.index("--budget") + 1
    assert 0 < float(again[budget]) < 100
    again[budget] = "100"
    monkeypatch.undo()  # what was asked for is understood, and nothing of it is lost
    parser = _parser()
    wanted, got = (vars(parser.parse_args(line)) for line in (arguments, again))
    defaults = {"resume": True, "batch_size": [1], "dtype": ["float32"], "seconds": 0.0, "budget": 100.0}
    skip = ("error", "run")
    assert {k: v for k, v in got.items() if k not in skip} == {
        **{k: v for k, v in wanted.items() if k not in skip},
        **defaults,
    }


def test_a_device_that_is_lost_again_and_again_ends_the_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"

    def lose(args, kept, facts):
        kept.note("restarts", benchmark.RESTARTS)
        raise run.DeviceLost("sdpa: illegal memory access")

    monkeypatch.setattr(benchmark, "_measure", lose)
    monkeypatch.setattr(benchmark.os, "execv", lambda *args: pytest.fail("another process"))
    assert main([*QUICK, "--out", str(path)]) == 1
    assert "the device was lost" in capsys.readouterr().err
