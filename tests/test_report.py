# SPDX-License-Identifier: Apache-2.0
"""The report of the benchmarks: tables, summary, goals and pictures of a fabricated result."""

import json
import re

import pytest
from reports import REPORT, python, report

# Numbers that divide easily.


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
