# SPDX-License-Identifier: Apache-2.0
"""Real installs of a copy of this tree, without network: what they contain, and what happens where nothing compiles."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__", "*venv*"
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]
NO_COMPILER = {"PATH": "", "CXX": "/nonexistent/c++"}


def run(command, cwd, check=True, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TIMESFORMER_KERNELS_") and k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def copied(folder):
    shutil.copytree(ROOT, folder, ignore=LEFT_BEHIND)
    return folder


def install(tree, target, *options, check=True, **environment):
    return run([*PIP, "install", *OFFLINE, "--target", target, *options, tree], tree.parent, check, **environment)


def python(code, cwd, *path):
    """Output of code where `path` comes first among the imports, and its .pth files count as in site-packages.

    -S keeps out the .pth files of this environment: they would show the developer's own editable install.
    """
    first, last = [str(p) for p in path], [p for p in sys.path if p.endswith("-packages")]
    head = f"import site, sys; sys.path[1:1] = {first}; [site.addsitedir(p) for p in {first}]; sys.path += {last}\n"
    return run([sys.executable, "-S", "-c", head + code], cwd).stdout


def record_of(target):
    return json.loads((target / "timesformer_kernels/_build_info.json").read_text(encoding="utf-8"))


RUN_KERNEL = """
import pathlib, torch, timesformer_kernels
q, k, v = torch.randn(3, 1, 1 + 4 * 3, 2, 16).unbind()
out = timesformer_kernels.time_attention(q, k, v, frames=3, backend="cpp")
reference = timesformer_kernels.time_attention(q, k, v, frames=3, backend="reference")
torch.testing.assert_close(out, reference)
print(pathlib.Path(timesformer_kernels.__file__).parent)
"""
INFO = "import json, timesformer_kernels.info as info; print(json.dumps(info.report()))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tree = copied(tmp_path_factory.mktemp("sdist") / "tree")
    for product in ("csrc/cpu/left.o", "tests/left.so", "kernels/timesformer_kernels/_cpu.so"):
        (tree / product).write_bytes(b"of an earlier build")
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    return tree / "dist" / run([sys.executable, "-c", code], tree).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so that whatever that lacks fails here."""
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, sdist], folder, TIMESFORMER_KERNELS_REQUIRE_NATIVE="1")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """site-packages after an install from the sdist's wheel."""
    target = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], target)
    return target


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    """(site-packages, tree) after an install where no compiler exists."""
    folder = tmp_path_factory.mktemp("without_compiler")
    tree = copied(folder / "tree")
    install(tree, folder / "site", **NO_COMPILER)
    return folder / "site", tree


@pytest.fixture(scope="module")
def old_compiler(tmp_path_factory):
    """CXX for a compiler that does not know AVX512-BF16, and quick: what its users test is not speed."""
    path = tmp_path_factory.mktemp("old compiler") / "c++"
    reject = 'case " $* " in *avx512bf16*) echo "unknown option" >&2; exit 1;; esac'
    path.write_text(f'#!/bin/sh\n{reject}\nexec {shutil.which("g++") or shutil.which("c++")} "$@" -O0\n')
    path.chmod(0o755)
    return f"'{path}'"


def test_sdist_holds_the_sources_and_no_build_product(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert {p.relative_to(ROOT).as_posix() for p in sources} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/oracle.py"} <= names
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc", "_build_info.json"))]


def test_wheel_serves_every_python_and_holds_only_the_two_packages(wheel):
    tag = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert f"Tag: {tag}" in archive.read(next(n for n in names if n.endswith("/WHEEL"))).decode().splitlines()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "timesformer = timesformer.cli:main" in entry_points
    packages = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert packages == {"timesformer", "timesformer_kernels"}
    assert {"timesformer_kernels/_cpu.so", "timesformer_kernels/_build_info.json"} <= names
    modules = {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    modules |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "timesformer").rglob("*.py")}
    assert modules == {n for n in names if n.endswith(".py")}


def test_an_installed_kernel_runs_from_any_directory(installed, tmp_path):
    assert python(RUN_KERNEL, tmp_path, installed).strip() == str(installed / "timesformer_kernels")


def test_build_record(installed):
    record = record_of(installed)
    assert record["_cpu"]["status"] == "ok"
    assert "-O3" in record["_cpu"]["flags"] and record["_cpu"]["compiler"]
    assert record["_cpu"]["isas"]["baseline"] == []
    assert record["_cuda"]["status"] == "skipped: this version contains no CUDA sources"
    assert len(record["source_hash"]) == 16


@pytest.mark.parametrize("at_root", [False, True], ids=["elsewhere", "in the repository"])
def test_a_package_called_kernels_keeps_its_name(installed, tmp_path, at_root):
    """Hugging Face's `kernels` is installed beside us; in the repository a folder of that name is in the way."""
    (tmp_path / "hub/kernels").mkdir(parents=True)
    (tmp_path / "hub/kernels/__init__.py").write_text("name = 'theirs'\n")
    code = "import kernels; print(kernels.name)\n" + RUN_KERNEL
    lines = python(code, ROOT if at_root else tmp_path, installed, tmp_path / "hub").split()
    assert lines == ["theirs", str(installed / "timesformer_kernels")]


def test_editable_install_from_a_path_with_spaces_and_umlauts(old_compiler, tmp_path):
    tree, target = copied(tmp_path / "a b ünï" / "tree"), tmp_path / "site"
    environment = {"TIMESFORMER_KERNELS_REQUIRE_NATIVE": "1", "CXX": old_compiler}
    run([*PIP, "install", *OFFLINE, "--target", target, "-e", tree], tmp_path, **environment)
    assert python(RUN_KERNEL, tmp_path, target).strip() == str(tree / "kernels/timesformer_kernels")
    assert record_of(tree / "kernels")["_cpu"]["status"] == "ok"
    assert json.loads(python(INFO, tmp_path, target))["libraries"]["_cpu"]["stale"] is False
    with open(tree / "csrc/abi.h", "a") as header:
        header.write("// changed after the build\n")
    assert json.loads(python(INFO, tmp_path, target))["libraries"]["_cpu"]["stale"] is True


def test_without_a_compiler_it_installs_and_says_why(without_compiler, tmp_path):
    site, _ = without_compiler
    assert not list(site.rglob("*.so"))
    reason = "the C++ compiler named by CXX does not exist: /nonexistent/c++"
    assert record_of(site)["_cpu"] == {"status": f"skipped: {reason}"}
    info = json.loads(python(INFO, tmp_path, site))
    assert not info["libraries"]["_cpu"]["ok"]
    assert reason in info["libraries"]["_cpu"]["reason"]
    assert reason in info["backends"]["cpu"]["float32"]["cpp"]
    assert info["backends"]["cpu"]["float32"]["reference"] is None


def test_a_failed_build_leaves_no_stale_library(without_compiler, tmp_path):
    _, tree = without_compiler
    stale = tree / "kernels/timesformer_kernels/_cpu.so"
    stale.write_bytes(b"of an earlier build")
    run([*PIP, "install", *OFFLINE, "--target", tmp_path / "site", "-e", tree], tmp_path, **NO_COMPILER)
    assert not stale.exists()
    assert record_of(tree / "kernels")["_cpu"]["status"].startswith("skipped: ")


def test_a_compiler_that_fails_is_quoted(without_compiler, tmp_path):
    """The sources do not compile: pip hides the compiler's output, so the record keeps its first error."""
    _, tree = without_compiler
    source = tree / "csrc/cpu/attention.cpp"
    good = source.read_bytes()
    source.write_text("#error this cannot be compiled\n")
    try:
        install(tree, tmp_path / "site")
    finally:
        source.write_bytes(good)
    assert "#error this cannot be compiled" in record_of(tmp_path / "site")["_cpu"]["status"]
    assert not list((tmp_path / "site").rglob("*.so"))


@pytest.mark.parametrize(
    "environment, message",
    [
        pytest.param(
            {"TIMESFORMER_KERNELS_REQUIRE_NATIVE": "1", **NO_COMPILER}, "/nonexistent/c++", id="native required"
        ),
        pytest.param({"TIMESFORMER_KERNELS_CUDA": "1"}, "this version contains no CUDA sources", id="CUDA required"),
        pytest.param({"TIMESFORMER_KERNELS_CUDA": "yes"}, "must be auto, 0 or 1, got 'yes'", id="CUDA misspelt"),
        pytest.param({"MAX_JOBS": "0"}, "MAX_JOBS must be a positive integer, got '0'", id="no jobs"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(without_compiler, tmp_path, environment, message):
    _, tree = without_compiler
    done = install(tree, tmp_path / "site", check=False, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "site").exists()


def test_the_instruction_sets_a_compiler_rejects_are_left_out(without_compiler, old_compiler, tmp_path):
    _, tree = without_compiler
    install(tree, tmp_path / "site", CXX=old_compiler, TIMESFORMER_KERNELS_CUDA="0")
    record = record_of(tmp_path / "site")
    assert record["_cuda"]["status"] == "skipped: TIMESFORMER_KERNELS_CUDA=0"
    if platform.machine() == "x86_64":
        assert record["_cpu"]["isas_rejected"] == ["avx512bf16"]
    assert "avx512bf16" not in record["_cpu"]["isas"]
    python(RUN_KERNEL, tmp_path, tmp_path / "site")
