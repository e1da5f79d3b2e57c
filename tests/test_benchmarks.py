# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: every row agrees with the float64 oracle, the JSON is complete, the report says what the JSON holds.

Run as a user runs them, in a process of their own: nothing in tests/ imports from benchmarks/.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "report.py"


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}
    )


def report(path):
    return python(REPORT, path)


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
        assert info["peak_copy_256MiB_GBps"] > 0 and info["peak_matmul_1024_GFLOPps"] > 0
        if info["row"] != "copy":
            # Rounding leaves a trace: an error of exactly zero would mean that nothing was compared.
            assert 0 < info["max_err"] < 0.1
            assert (info["max_err_grad"] is not None) == (info["direction"] != "forward")


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


def bench(group, row, median_ms, **info):
    facts = dict(row=row, dtype="float32", direction="forward", chip="Chip 9000", isa="avx2", threads=1, torch="9.9")
    stats = {"median": median_ms / 2000}  # seconds; warm calls take half the time
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


def test_summary(tmp_path):
    common = dict(kind="attention", op="space attention", shape="8x224: B=1")
    benchmarks = [bench("g", "cpp", 2.0, **common), bench("g", "sdpa", 5.0, **common)]
    benchmarks += [bench("m", "ours", 105.0, kind="model", op="TimeSformer-B", shape="8x224: B=1")]
    run = python(REPORT, "--summary", fabricated(tmp_path, *benchmarks))
    assert "| space attention, forward, float32 | 2.00 | 2.50 | – | – | 1.00 | 2.50 | – | – |" in run.stdout, run.stderr
    assert "|  | cold ms | x sdpa | x eager | copy | warm ms | x sdpa | x eager | copy |" in run.stdout
    assert "Chip 9000" in run.stdout and "| ours | 105.0 |" in run.stdout
    run = python(REPORT, "--summary", fabricated(tmp_path, benchmarks[1]))
    assert run.returncode == 2 and "'cpp'" in run.stderr


def test_a_missing_row_leaves_a_dash(tmp_path):
    common = dict(kind="attention", op="time attention", shape="8x224: B=1")
    rows = rendered(fabricated(tmp_path, bench("g", "cpp", 2.0, **common)))[1]
    assert rows["cpp"] == ["2.00", "–", "–", "–", "1.00", "–", "–", "–"]


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
