# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_check.sh: its options, stages that never stop one another, what is repeated, what the table says."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "scripts" / "gpu"


@pytest.fixture(scope="module")
def gpu():
    """The modules of scripts/gpu, which is no package: the programs in it run by themselves."""
    sys.path.insert(0, str(GPU))
    try:
        import check
        import findings
        import probe
        import pytest_gpu
        import sanitizers
        import stages
    finally:
        sys.path.remove(str(GPU))
    names = (check, findings, probe, pytest_gpu, sanitizers, stages)
    return type("Modules", (), {module.__name__: module for module in names})


def python(code):
    """Commands of a stage that runs this code in its folder's parent."""
    return lambda context: [[sys.executable, "-c", f"folder = {str(context.folder)!r}\n{code}"]]


PASS = "import json; json.dump(dict(ok=True, finding='fine'), open(folder + '/result.json', 'w'))"
WRONG = "import json; json.dump(dict(ok=False, finding='a wrong result'), open(folder + '/result.json', 'w'))"


@pytest.fixture
def run(gpu, tmp_path):
    """run({name: code}, ...) -> results of these stages, in order."""

    def go(codes, seconds=200.0, limit=15, force=False, mode="cpu", **options):
        made = tuple(
            gpu.stages.Stage(name, name, (limit,) * 3, python(code), gpu.findings.plain, (), **options)
            for name, code in codes.items()
        )
        job = gpu.check.Run(tmp_path / "out", mode, seconds, force, made)
        return job.go(made)

    return go


def statuses(results):
    return {name: result["status"] for name, result in results.items()}


# --- stages ----------------------------------------------------------------------------------------------------------


def test_no_stage_stops_another(run, tmp_path):
    raises = "raise SystemExit('cannot go on')"
    silent = "pass"
    results = run({"first": PASS, "raises": raises, "wrong": WRONG, "silent": silent, "last": PASS})
    expected = dict(first="passed", raises="failed", wrong="failed", silent="failed", last="passed")
    assert statuses(results) == expected
    assert results["first"]["finding"] == "fine" and results["wrong"]["finding"] == "a wrong result"
    assert "cannot go on" in results["raises"]["finding"] and "exit status 1" in results["raises"]["finding"]
    assert "no result" in results["silent"]["finding"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["ok"] is False and {k: v["status"] for k, v in summary["stages"].items()} == expected
    for name in expected:
        assert json.loads((tmp_path / f"out/{name}.json").read_text())["status"] == expected[name]
    assert "cannot go on" in (tmp_path / "out/raises.log").read_text()
    with tarfile.open(tmp_path / "out/results.tar.gz") as tar:
        assert {"summary.json", "raises.log", "first/result.json"} <= set(tar.getnames())


def test_a_pass_that_left_no_status_of_its_own_is_judged_by_its_files(run):
    """Exit status 0 does not make wrong results right, and right results do not make up for a crash."""
    results = run({"crash": PASS + "\nimport os; os.abort()", "wrong": WRONG})
    assert statuses(results) == {"crash": "failed", "wrong": "failed"}
    assert "exit status -6" in results["crash"]["finding"]


def test_time_limit_ends_a_stage_and_its_children(run, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.check, "GRACE", 1.0)
    pid = tmp_path / "pid"
    stuck = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    results = run({"stuck": stuck, "last": PASS}, seconds=14.0, limit=7)
    assert statuses(results) == {"stuck": "timed out", "last": "passed"} and time.monotonic() - start < 14
    deadline = time.monotonic() + 5
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_stage_may_write_what_it_found(run, gpu, monkeypatch):
    monkeypatch.setattr(gpu.check, "GRACE", 10.0)  # what a busy machine needs, not what is waited for
    # In the background of a shell the signal is ignored, and children inherit that.
    heed = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    slow = f"{heed}try:\n    time.sleep(90)\nexcept KeyboardInterrupt:\n    {PASS}"
    (result,) = run({"slow": slow}, seconds=24.0, limit=24).values()
    assert result["status"] == "timed out" and result["finding"].endswith("fine")


def test_time_is_shared(run, gpu):
    """A stage has its own limit and what those before it left, never what is another's."""
    share = gpu.check.share
    assert share(100.0, 20.0, 50.0) == 50.0 and share(70.0, 20.0, 50.0) == 20.0
    assert share(35.0, 20.0, 50.0) == pytest.approx(10.0) and share(30.0, 20.0, 0.0) == 30.0
    assert share(-3.0, 20.0, 50.0) < 0
    results = run({"first": PASS, "last": PASS}, seconds=15.0, limit=15)  # 7.5 s are too little, 15 are enough
    assert statuses(results) == {"first": "not run", "last": "passed"}
    assert "run the same command again" in results["first"]["finding"]


def test_exit_status_of_a_stage_without_work(run):
    results = run({"skip": "print('one GPU'); raise SystemExit(77)", "last": PASS})
    assert statuses(results) == {"skip": "skipped", "last": "passed"} and results["skip"]["finding"] == "one GPU"


# --- going on --------------------------------------------------------------------------------------------------------

COUNT = "open(folder + '.count', 'a').write('x')\n"


def times(tmp_path, name):
    return len((tmp_path / f"out/{name}.count").read_text())


def test_what_passed_is_not_repeated(run, tmp_path):
    codes = {"good": COUNT + PASS, "bad": COUNT + WRONG}
    run(codes)
    results = run(codes)
    assert statuses(results) == {"good": "skipped", "bad": "failed"}
    assert results["good"]["finding"] == "passed before: fine" and results["good"]["kept"]
    assert (times(tmp_path, "good"), times(tmp_path, "bad")) == (1, 2)
    assert statuses(run({**codes, "bad": COUNT + PASS})) == {"good": "skipped", "bad": "passed"}
    assert statuses(run(codes, force=True))["good"] == "passed" and times(tmp_path, "good") == 2
    assert statuses(run(codes, mode="quick"))["good"] == "passed"  # of another mode
    assert statuses(run(codes, always=True))["good"] == "passed"


def test_changed_sources_and_other_devices_are_checked_again(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.check, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels/a.py"
    source.write_text("1")
    identity = {"device": "one"}

    def facts(context):
        return "", {"identity": dict(identity)}

    env = gpu.stages.Stage("env", "", (10,) * 3, python("pass"), facts, (), always=True)
    stage = gpu.stages.Stage("good", "", (15,) * 3, python(PASS), gpu.findings.plain, ("kernels",))

    def status():
        return gpu.check.Run(tmp_path / "out", "full", 60.0).go((env, stage))["good"]["status"]

    assert [status(), status()] == ["passed", "skipped"]
    source.write_text("2")
    assert [status(), status()] == ["passed", "skipped"]
    identity["device"] = "another"
    assert [status(), status()] == ["passed", "skipped"]


def test_files_of_a_stopped_stage_are_gone_on_with(run, tmp_path):
    slow = "import os; open(folder + '/part', 'a').write('x')\n" + WRONG
    run({"slow": slow})
    run({"slow": slow})
    assert (tmp_path / "out/slow/part").read_text() == "xx"
    run({"slow": slow}, force=True)
    assert (tmp_path / "out/slow/part").read_text() == "x"


def test_a_result_that_is_not_json_is_no_pass(run, tmp_path):
    run({"good": COUNT + PASS})
    (tmp_path / "out/good.json").write_text("{")
    assert statuses(run({"good": COUNT + PASS})) == {"good": "passed"} and times(tmp_path, "good") == 2


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    run = [str(ROOT / "scripts/gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "arguments, words",
    [
        pytest.param([], ["--out"], id="no-folder"),
        pytest.param(["--out", __file__], ["--out", "not a folder"], id="a-file"),
        pytest.param(["--out", str(GPU)], ["--out", "holds other files"], id="somebody-else's-folder"),
        pytest.param(["--out", "x", "--quick", "--cpu"], ["--quick", "--cpu", "at most one"], id="two-modes"),
        pytest.param(["--out", "x", "--only", "tests,cores"], ["--only", "'cores'", "bench-core"], id="unknown-stage"),
        pytest.param(["--out", "x", "--seconds", "0"], ["--seconds", "0"], id="no-time"),
    ],
)
def test_bad_arguments(gpu, arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.check.options(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in said for word in words), said


def test_only(gpu):
    names = [stage.name for stage in gpu.check.options(["--out", "x", "--only", "bench, graphs"]).stages]
    assert names == ["env", "build", "graphs", "bench-core", "bench-block", "bench-model", "bench-train"]


@pytest.mark.parametrize("mode", ["full", "quick", "cpu"])
def test_limits_fit_the_run(gpu, mode):
    """Every stage can have its limit, and the whole ends in time: 9 minutes, 5 where something is left out."""
    chosen = gpu.check.choose(None, gpu.check.STAGES, mode)
    total = sum(stage.limit(mode) for stage in chosen)
    assert total <= gpu.check.SECONDS[mode] <= (540 if mode == "full" else 300) - 10
    assert min(stage.limit(mode) for stage in chosen) >= 2 * gpu.check.GRACE
    if mode == "cpu":
        assert chosen == gpu.check.STAGES  # a rehearsal leaves nothing out


def test_every_stage_runs_what_exists(gpu, tmp_path):
    for mode in ("full", "quick", "cpu"):
        for stage in gpu.check.STAGES:
            for line in stage.commands(gpu.stages.Context(ROOT, tmp_path, mode, 30.0)):
                assert line[0] == sys.executable
                files = [word for word in line if word.endswith(".py")]
                assert all((ROOT / word).exists() for word in files), (stage.name, files)
                assert not any(word.startswith(str(Path.home())) for word in line[1:] if not word.startswith(str(ROOT)))


def test_the_benchmarks_options_are_understood(gpu, tmp_path):
    """Rows and options of every benchmark that a GPU would run, by the parser and lists that will read them."""
    from timesformer.benchmarking import core, peers
    from timesformer.cli import _parser

    quick = {"triton", "cuda", "ours", "copy", *core.QUICK["cuda"]}
    full = quick | set(peers.PEERS)
    for mode in ("full", "quick", "cpu"):
        for stage in gpu.check.STAGES:
            for line in stage.commands(gpu.stages.Context(ROOT, tmp_path, mode, 30.0)):
                if "timesformer.cli" in line:
                    args = _parser().parse_args(line[line.index("benchmark") :])
                    assert set(args.rows or ()) <= (full if args.full else quick) and args.out.startswith(str(tmp_path))


def test_the_command_prints_a_table_and_ends_with_its_status(tmp_path):
    listed = command("--list")
    assert listed.returncode == 0 and "registration" in listed.stdout, listed.stderr
    done = command("--out", tmp_path / "out", "--cpu", "--only", "env", "--seconds", "120")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    env, build = (summary["stages"][name] for name in ("env", "build"))
    assert env["status"] == "passed" and env["data"]["versions"]["torch"], done.stdout + done.stderr
    assert done.returncode == (0 if build["status"] == "passed" else 1)
    table = done.stdout.rstrip().splitlines()[-4:-2]
    assert [line.split()[0] for line in table] == ["env", "build"] and env["finding"] in table[0]
    assert str(Path.home()) not in (tmp_path / "out/env.json").read_text()


# --- what is read from files -----------------------------------------------------------------------------------------


def context(gpu, folder):
    return gpu.stages.Context(ROOT, folder, "full", 30.0)


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skip(): pytest.skip("no reason")
def test_needs(): import av_of_another_world
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_error(broken): pass
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_opcheck(name): print("ran", name)
"""


@pytest.fixture
def pytest_run(gpu, tmp_path):
    """pytest_run(text) runs a test file with the plugin; (exit status, findings or the failure, output)."""

    def go(text, finding="tests"):
        file = tmp_path / "test_it.py"
        file.write_text(text)
        options = ["-q", "-s", "-p", "pytest_gpu", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        options += ["-c", os.devnull, f"--gpu-reports={tmp_path / 'reports.jsonl'}"]
        path = os.pathsep.join([str(GPU), str(tmp_path)])
        env = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
        run = [sys.executable, "-m", "pytest", *options, str(file)]
        done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
        try:
            found = getattr(gpu.findings, finding)(context(gpu, tmp_path))
        except gpu.findings.Failed as error:
            found = str(error), error.data
        return done.returncode, found, done.stdout + done.stderr

    return go


def test_reports_of_a_test_run(pytest_run):
    code, (text, data), output = pytest_run(TESTS)
    assert code == 1, output
    assert data["count"] == {"passed": 3, "failed": 2, "error": 1, "skipped": 1}
    assert text.endswith("test_it.py::test_bad, test_it.py::test_needs, test_it.py::test_error")
    assert data["skipped"] == {"no reason": 1} and "one is not two" in data["failed"][0]["reason"]
    assert output.index("ran triton") < output.index("ran cpp")  # the GPU's first


def test_a_second_run_goes_on_behind_what_passed(pytest_run):
    pytest_run(TESTS)
    code, (_, data), output = pytest_run(TESTS.replace("1 == 2", "1 == 1"))
    assert "ran" not in output.split("short test summary")[0].replace("rans", "") and "3 deselected" in output
    assert data["count"] == {"passed": 4, "failed": 1, "error": 1, "skipped": 1}


def test_a_missing_optional_package_is_a_skip(pytest_run, monkeypatch, gpu):
    """In a test, and at the top of a file; behind an error of our own, too. Another missing module is an error."""
    text = """
import pytest_gpu
pytest_gpu.OPTIONAL.add("av_of_another_world")
"""
    inside = "def test_good(): pass\ndef test_av():\n    import av_of_another_world\n"
    wrapped = """
def test_wrapped():
    try:
        import av_of_another_world
    except ImportError as error:
        raise RuntimeError("install the extra") from error
"""
    code, (_, data), output = pytest_run(text + inside + wrapped)
    assert code == 0 and data["count"] == {"passed": 1, "skipped": 2}, output
    assert data["skipped"] == {"av_of_another_world is not installed": 2}
    code, (found, data), output = pytest_run(text + "import av_of_another_world\ndef test_good(): pass\n")
    assert code == 5 and "1 skipped" in output and "failed" not in found, output  # 5: no test ran
    assert data["skipped"]["av_of_another_world is not installed"] == 3  # the first run's, and the file
    code, (found, _), _ = pytest_run("import nothing_of_the_kind\n")
    assert code == 2 and "1 error" in found


def test_registration_is_a_table(pytest_run):
    _, (_, data), _ = pytest_run(TESTS, "registration")
    assert data["matrix"]["opcheck"] == {"triton": Counter(passed=1), "cpp": Counter(passed=1)}


def lines(tmp_path, *reports):
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))


def test_no_test_is_no_pass_nor_is_one_that_never_ended(gpu, tmp_path):
    good = {"id": "f::good", "outcome": "passed", "seconds": 0.1}
    lines(tmp_path, {"selected": 1}, {**good, "outcome": "skipped", "reason": "x"})
    with pytest.raises(gpu.findings.Failed, match="1 skipped"):
        gpu.findings.tests(context(gpu, tmp_path))
    lines(tmp_path, {"selected": 2}, good)
    with pytest.raises(gpu.findings.Failed, match="1 passed, 1 never ended"):
        gpu.findings.tests(context(gpu, tmp_path))
    lines(tmp_path, {"selected": 2}, good, {"selected": 1}, {**good, "id": "f::other"})  # the second run, of the rest
    assert gpu.findings.tests(context(gpu, tmp_path))[0] == "2 passed"


def rows(tmp_path, found, **machine):
    benchmarks = [{"group": "g", "extra_info": {"row": row, "device": "cuda", **info}} for row, info in found.items()]
    text = json.dumps({"machine_info": machine, "benchmarks": benchmarks})
    (tmp_path / "0.json").write_text(text)


def test_a_row_of_ours_must_run(gpu, tmp_path):
    good = {"interleaved_median_ms": 2.0}
    rows(tmp_path, {"triton": good, "sdpa": {"interleaved_median_ms": 5.0}, "sdpa-flash": {"reason": "no kernel"}})
    text, data = gpu.findings.bench(context(gpu, tmp_path))
    assert text == "2 rows in 1 tables, 1 cannot run; x sdpa 2.50 to 2.50, median 2.50"
    assert data["groups"]["g"]["x sdpa"] == 2.5 and data["unable"] == {"g: sdpa-flash": "no kernel"}
    for wrong in ({"triton": {"reason": "wrong numbers"}, "sdpa": good}, {"sdpa": {"reason": "none"}}):
        rows(tmp_path, wrong)
        with pytest.raises(gpu.findings.Failed):
            gpu.findings.bench(context(gpu, tmp_path))
    rows(tmp_path, {"triton": good}, failed=["space: out of memory"])
    with pytest.raises(gpu.findings.Failed, match="out of memory"):
        gpu.findings.bench(context(gpu, tmp_path))
    rows(tmp_path, {"cpp": {"reason": "no kernel for cuda"}, "triton": good}, left_out=["space"])
    assert "1 tables left out" in gpu.findings.bench(context(gpu, tmp_path))[0]


def test_what_is_chosen_is_told(gpu, tmp_path):
    folder = tmp_path / "bench-core"
    folder.mkdir()
    rows(folder, {name: {"interleaved_median_ms": 2.0} for name in ("triton", "cuda")})
    text, data = gpu.findings.chosen(context(gpu, folder))
    assert text == "2 rows in 1 tables" and data["choice"] == []
    made = [{"backend": name, "reason": {"measured": {}}} for name in ("cuda", "triton", "cuda")]
    rules = [*made, {"backend": "triton", "reason": {"expected": "so"}}]
    (tmp_path / "choice.json").write_text(json.dumps({"rules": rules}))
    text, data = gpu.findings.chosen(context(gpu, folder))
    assert text == "2 rows in 1 tables; cuda chosen 2 times; triton chosen 1 times" and data["choice"] == made


def test_the_benchmarks_end_with_a_choice(gpu, tmp_path):
    """By the script itself, from what the stage left in its folder; every row list that compares has both backends."""
    (stage,) = (stage for stage in gpu.check.STAGES if stage.name == "bench-core")
    assert "scripts/choose_backend.py" in stage.sources
    folder = tmp_path / "bench-core"
    folder.mkdir()
    common = dict(kind="attention", op="time attention", shape="8x224: B=8, N=196, T=8, 12 heads of 64", chip="a GPU")
    common |= dict(dtype="bfloat16", capability="9.0", frames=8, locations=196)
    rows(folder, {name: {**common, "interleaved_median_ms": ms} for name, ms in (("cuda", 1.0), ("triton", 2.0))})
    result = json.loads((folder / "0.json").read_text()) | {"datetime": "2031-02-03T04:05:06+00:00"}
    (folder / "0.json").write_text(json.dumps(result))
    command = stage.commands(gpu.stages.Context(ROOT, folder, "full", 30.0))[-1]
    rule = dict(architecture="any", dtypes=["bfloat16"], head_dim=[1, 128], members=[0, 16], backend="triton")
    rule |= {"reason": {"expected": "so"}}
    (tmp_path / "present.json").write_text(json.dumps({"rules": [rule]}))  # whatever the package's own say by now
    command = [*command, "--table", str(tmp_path / "present.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "instead of triton: sm_90, bfloat16" in done.stdout, done.stdout + done.stderr
    assert gpu.findings.chosen(context(gpu, folder))[1]["choice"][0]["backend"] == "cuda"
    for names in (gpu.stages.GOAL_ROWS, gpu.stages.COMPILED_ROWS, gpu.stages.BATCH_ROWS):
        assert {"triton", "cuda"} <= set(names.split())


def test_resources_with_problems_fail(gpu, tmp_path):
    report = dict(kernel="k", arch=90, dtype="bfloat16", members=8, registers=64, spill=0, shared=2048, problems=[])
    (tmp_path / "result.json").write_text(json.dumps({"reports": [report]}))
    assert gpu.findings.resources(context(gpu, tmp_path))[0] == "1 kernels, at most 64 registers, 2 KiB shared"
    (tmp_path / "result.json").write_text(json.dumps({"reports": [{**report, "problems": ["spills (8)"]}]}))
    with pytest.raises(gpu.findings.Failed, match=r"spills \(8\)"):
        gpu.findings.resources(context(gpu, tmp_path))
    (tmp_path / "result.json").write_text(json.dumps({"reports": []}))
    with pytest.raises(gpu.findings.Failed):
        gpu.findings.resources(context(gpu, tmp_path))


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x1f0
=========     by thread (96,0,0) in block (0,0,0)
=========     Access at 0x7f is out of bounds
=========
5 calls ran to their end
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {kernel}+0x260 in a.py:5
=========     and Read access at {kernel}+0x2a0 in a.py:6 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n5 calls\n========= {} SUMMARY: 0 {}\n"


@pytest.mark.parametrize("text", [MEMCHECK, RACECHECK], ids=["memcheck", "racecheck"])
def test_errors_of_our_kernels_count(gpu, text):
    names = gpu.sanitizers.kernel_names()
    assert {"resident_forward", "streaming_forward", "class_backward", "short_forward_kernel"} <= names
    said = gpu.sanitizers.read("tool", text.format(kernel="resident_forward"), names)
    assert not said["ok"] and said["ours"][0]["kernel"] == "resident_forward"
    template = "void tsk::short_forward_kernel<__nv_bfloat16, (int)64, (int)8>(tsk::Problem, tsk::ShortGrid)"
    said = gpu.sanitizers.read("tool", text.format(kernel=template), names)
    assert not said["ok"] and said["ours"][0]["kernel"] == "short_forward_kernel"
    said = gpu.sanitizers.read("tool", text.format(kernel="elementwise_kernel"), names)
    assert said["ok"] and not said["ours"] and said["others"][0]["kernel"] == "elementwise_kernel"


def test_a_clean_report_and_one_that_cannot_be_read(gpu):
    for kind, unit in (("ERROR", "errors"), ("RACECHECK", "hazards displayed (0 errors, 0 warnings)")):
        assert gpu.sanitizers.read("tool", CLEAN.format(kind, unit), {"k"})["ok"]
    for text in ("", "Error: unknown option", CLEAN.replace("0 {}", "3 errors").format("ERROR")):
        assert not gpu.sanitizers.read("tool", text, {"k"})["ok"]


def test_parts_of_a_tools_calls_count_together(gpu):
    """One that is bad, or did not run to its end, makes all of them so."""
    clean = CLEAN.replace("5 calls", "5 calls ran to their end").format("ERROR", "errors")
    names = {"k"}
    said = gpu.sanitizers.together("memcheck", [clean, clean], names)
    assert said["ok"] and said["calls"] == 10
    said = gpu.sanitizers.together("memcheck", [clean, MEMCHECK.format(kernel="k")], names)
    assert not said["ok"] and said["ours"][0]["kernel"] == "k" and said["text"] == "1 error"
    said = gpu.sanitizers.together("memcheck", [clean, CLEAN.format("ERROR", "errors")], names)
    assert not said["ok"] and "did not run to its end" in said["text"] and said["calls"] == 5


def test_checks_fail_by_themselves(gpu, tmp_path, capsys):
    checks = gpu.probe.Checks(tmp_path / "a.json", "checks")
    assert checks.end() == 1  # nothing was checked
    with checks.check("good") as say:
        say("two words", number=2)
    assert checks.end() == 0
    with checks.check("bad"):
        raise AssertionError("it differs\nand more")
    assert checks.end() == 1
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["ok"] is False and result["finding"] == "1 of 2 checks failed: bad: AssertionError: it differs"
    assert result["checks"]["good"]["number"] == 2


def test_a_sessions_calls_are_compared_and_timed(tmp_path):
    """On tiny models, without a graph."""
    command = [sys.executable, str(GPU / "session.py"), "--cpu", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for check in json.loads((tmp_path / "a.json").read_text())["checks"].values():
        assert check["errors"].keys() == check["milliseconds"].keys() and check["milliseconds"]["session"] > 0
        assert {"session", "plain"} <= check["errors"].keys() and max(check["errors"].values()) < 1e-4


def judged(program, tmp_path, wrong=""):
    """(exit status, result) of a program; backend `wrong` is Triton's with results that drift from call to call."""
    code = f"""
import sys; sys.path.insert(0, {str(GPU)!r})
from dataclasses import replace
from timesformer_kernels import registry
import calls, {program}
real, count = registry.get("triton"), []
def forward(*args):
    count.append(None)
    return real.forward(*args) + 0.125 * len(count)
if {wrong!r}:
    registry._BACKENDS[{wrong!r}] = replace(real, name={wrong!r}, forward=forward)
registry.resolve.cache_clear()
if {program!r} != "large":
    {program}.AddLayerNorm = {program}.BiasGelu = lambda **size: calls.Attention("time", (1, 1, 2), "none", head_dim=16)
    {program}.model = lambda *args: None
sys.argv = ["x", "--cpu", "--json", {str(tmp_path / "a.json")!r}]
sys.exit({program}.main())
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (tmp_path / "a.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("program", ["graphs", "large", "streams"])
def test_programs_notice_a_wrong_kernel(program, tmp_path):
    """The comparison itself."""
    status, result = judged(program, tmp_path, wrong="triton")
    checks = result["checks"]
    assert status == 1 and checks and not any(check["ok"] for check in checks.values()), checks


@pytest.mark.parametrize("program", ["graphs", "large", "streams"])
def test_programs_watch_every_backend(program, tmp_path):
    """Beside a right one a wrong one; and one that cannot run is named."""
    status, result = judged(program, tmp_path, wrong="cuda")
    checks = result["checks"]
    wrong = {key: check["ok"] for key, check in checks.items() if "cuda: " in key}
    right = {key: check["ok"] for key, check in checks.items() if "triton: " in key}
    assert status == 1 and wrong and not any(wrong.values()) and all(right.values()), checks
    assert {key.replace("cuda: ", "triton: ") for key in wrong} <= right.keys()
    status, result = judged("large", tmp_path)
    assert status == 0 and "cuda cannot run: its kernels run on cuda, not on cpu" in result["finding"]
    assert result["cannot run"] == {"cuda": "its kernels run on cuda, not on cpu"}
