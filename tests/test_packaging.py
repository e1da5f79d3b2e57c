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
NO_NVCC = {"TIMESFORMER_KERNELS_CUDA": "auto", "CUDA_HOME": "/nonexistent"}


def run(command, cwd, check=True, **environment):
    """The CUDA library takes minutes: left out unless the environment asks for it."""
    environment = {"TIMESFORMER_KERNELS_CUDA": "0", **environment}
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
    assert {"timesformer_kernels/choice.json", "timesformer_kernels/backends/triton/configs.json"} <= names
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
    assert record["_cuda"]["status"] == "skipped: TIMESFORMER_KERNELS_CUDA=0"
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
        pytest.param({**NO_NVCC, "TIMESFORMER_KERNELS_CUDA": "1"}, "no nvcc found", id="CUDA required"),
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
    install(tree, tmp_path / "site", CXX=old_compiler)
    record = record_of(tmp_path / "site")
    if platform.machine() == "x86_64":
        assert record["_cpu"]["isas_rejected"] == ["avx512bf16", *(["amx"] if sys.platform == "linux" else [])]
    assert "avx512bf16" not in record["_cpu"]["isas"]
    python(RUN_KERNEL, tmp_path, tmp_path / "site")


# The CUDA library, by a toolkit that only takes notes

NVCC = r"""#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in
  --list-gpu-code) echo "$FAKE_KNOWS";;
  --version) echo "Cuda compilation tools, release 99.0";;
  *) [ -z "$FAKE_ERROR" ] || { echo "launch.cu(1): error: $FAKE_ERROR"; exit 2; }
     while [ $# -gt 0 ]; do [ "$1" != -o ] || echo library > "$2"; shift; done;;
esac
"""
SMI = '#!/bin/sh\n[ -n "$FAKE_GPUS" ] || exit 9\nprintf "$FAKE_GPUS"\n'


@pytest.fixture
def toolkit(tmp_path):
    """build(**environment) -> (exit status and output, record, arguments of the compilations) of a build in place."""
    tree, home = tmp_path / "tree", tmp_path / "tool kit"
    (home / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "kernels/timesformer_kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("timesformer_kernels/__init__.py", "timesformer_kernels/_version.py"):
        if (ROOT / "kernels" / name).exists():
            shutil.copy(ROOT / "kernels" / name, tree / "kernels" / name)
    for name, text in (("nvcc", NVCC), ("nvidia-smi", SMI)):
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)

    def build(**environment):
        (home / "bin/calls").write_text("")
        path = f"{home / 'bin'}{os.pathsep}{sysconfig.get_path('scripts')}{os.pathsep}{os.defpath}"
        defaults = {"CXX": "/nonexistent/c++", "PATH": path, "TIMESFORMER_KERNELS_CUDA": "auto", "CUDA_HOME": str(home)}
        defaults |= {"FAKE_KNOWS": "sm_75 sm_80 sm_90 sm_100 sm_120"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = run(command, tree, check=False, **{**defaults, **environment})
        record = record_of(tree / "kernels") if done.returncode == 0 else None
        calls = (home / "bin/calls").read_text().splitlines()
        return done, record, [call for call in calls if "-shared" in call]

    build.library = tree / "kernels/timesformer_kernels/_cuda.so"
    return build


def archs_of(call):
    return [word.rpartition("code=")[2] for word in call.split() if word.startswith("-gencode")]


@pytest.mark.parametrize(
    "environment, archs, ptx, why",
    [
        pytest.param({}, ["80", "90a", "100", "120"], "80", "no GPU is visible", id="no GPU"),
        pytest.param({"FAKE_GPUS": r"9.0\n9.0\n"}, ["90a"], None, "the visible GPUs", id="H200 twice"),
        pytest.param({"FAKE_GPUS": r"8.0\n12.0\n"}, ["80", "120"], None, "the visible GPUs", id="two kinds"),
        pytest.param(
            {"FAKE_GPUS": r"7.5\n"}, ["80", "90a", "100", "120"], "80", "no GPU is visible", id="too old a GPU"
        ),
        pytest.param(
            {"FAKE_GPUS": r"13.0\n"},
            ["80", "90a", "100", "120"],
            "80",
            "GPUs unknown to nvcc are visible",
            id="too new a GPU",
        ),
        pytest.param({"FAKE_KNOWS": "sm_80 sm_90"}, ["80", "90a"], "80", "no GPU is visible", id="old toolkit"),
        pytest.param(
            {"TIMESFORMER_KERNELS_CUDA_ARCHS": "90a;100", "FAKE_GPUS": r"8.0\n"},
            ["90a", "100"],
            None,
            "TIMESFORMER_KERNELS_CUDA_ARCHS",
            id="asked for",
        ),
    ],
)
def test_cuda_architectures(toolkit, environment, archs, ptx, why):
    done, record, calls = toolkit(**environment)
    cuda = record["_cuda"]
    assert (cuda["status"], cuda["archs"], cuda["ptx"], cuda["archs_from"]) == ("ok", archs, ptx, why)
    assert cuda["compiler"] == "Cuda compilation tools, release 99.0"
    assert [archs_of(call) for call in calls] == [[f"sm_{arch}" for arch in archs] + [f"compute_{ptx}"] * bool(ptx)]
    assert "-cudart=static" in calls[0] and "-lineinfo" in calls[0]
    assert toolkit.library.exists() and f"_cuda: ok for {' '.join(archs)} ({why})" in done.stderr


@pytest.mark.parametrize(
    "environment, reason",
    [
        pytest.param({"FAKE_ERROR": "no such thing"}, "launch.cu(1): error: no such thing", id="it does not compile"),
        pytest.param(
            {"TIMESFORMER_KERNELS_CUDA_ARCHS": "75"}, "got '75', this nvcc and we know 80 90 100 120", id="old"
        ),
        pytest.param({"TIMESFORMER_KERNELS_CUDA_ARCHS": "sm_90"}, "got 'sm_90'", id="misspelt"),
        pytest.param(
            {"FAKE_KNOWS": "sm_70"}, "nvcc knows none of the architectures 80, 90a, 100, 120", id="old toolkit"
        ),
        pytest.param({"CUDA_HOME": "/nonexistent"}, "no nvcc found", id="no nvcc"),
    ],
)
def test_a_cuda_library_that_cannot_be_built_is_left_out_and_said(toolkit, environment, reason):
    toolkit.library.write_text("of an earlier build")
    done, record, _ = toolkit(**environment)
    assert record["_cuda"]["status"].startswith("skipped: ") and reason in record["_cuda"]["status"]
    assert reason in done.stderr and not toolkit.library.exists()
    done, _, _ = toolkit(TIMESFORMER_KERNELS_CUDA="1", **environment)
    assert (
        done.returncode != 0
        and f"timesformer_kernels._cuda cannot be built: {record['_cuda']['status'][9:]}" in done.stderr
    )
