# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU library: a `build_ext` that drives ninja over a C++ compiler and records what it did.

The libraries are plain C ABI, so the build needs neither torch nor Python headers and one wheel serves every Python 3.
A library that cannot be built is left out, with a warning and a reason in `_build_info.json`; the install goes on.

Environment: CXX (compiler, may carry arguments), MAX_JOBS (parallel compilations, default 2),
TIMESFORMER_KERNELS_REQUIRE_NATIVE=1 (a library that cannot be built is an error), TIMESFORMER_KERNELS_CUDA=auto|0|1.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
CPU_LIBRARY = "timesformer_kernels._cpu"
RECORD = "_build_info.json"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2, "-mprefer-vector-width=512"]
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def jobs():
    value = os.environ.get("MAX_JOBS") or str(min(2, os.cpu_count() or 1))
    if not value.isdigit() or value == "0":
        raise CompileError(f"MAX_JOBS must be a positive integer, got {value!r}")
    return value


def cuda_status():
    """Why there is no CUDA library; asking for one that cannot exist is an error, never a silent CPU-only build."""
    want = os.environ.get("TIMESFORMER_KERNELS_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise CompileError(f"TIMESFORMER_KERNELS_CUDA must be auto, 0 or 1, got {want!r}")
    if want == "1":
        raise CompileError("TIMESFORMER_KERNELS_CUDA=1, but this version contains no CUDA sources")
    return "skipped: TIMESFORMER_KERNELS_CUDA=0" if want == "0" else "skipped: this version contains no CUDA sources"


def find_compiler():
    """The C++ compiler as a command list: $CXX if set, else the first of g++, c++, clang++ on PATH."""
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        command = [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
    if not command:
        raise CompileError("no C++ compiler found (tried g++, c++, clang++; set CXX to name another)")
    if not shutil.which(command[0]):
        raise CompileError(f"the C++ compiler named by CXX does not exist: {command[0]}")
    return command


def find_ninja():
    """Build isolation puts ninja on PATH; in an environment that is not activated it is only beside the interpreter."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if not ninja:
        raise CompileError("ninja not found on PATH or beside the Python interpreter")
    return ninja


def accepts(cxx, flags):
    probe = [*cxx, *CXX_FLAGS, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def escaped(path):
    """A path in a ninja build statement; in commands ninja itself quotes $in and $out for the shell."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def command(words):
    return shlex.join(words).replace("$", "$$")


def ninja_file(cxx, library, units):
    """Text of build.ninja; units is [(source, object, flags)]."""
    lines = ["rule compile", f"  command = {command([*cxx, *CXX_FLAGS])} $flags -MMD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc", "rule link", f"  command = {command(cxx)} -shared $in -o $out"]
    for source, obj, flags in units:
        lines += [f"build {escaped(obj)}: compile {escaped(source)}", f"  flags = {command(flags)}"]
    lines += [f"build {escaped(library)}: link {' '.join(escaped(obj) for _, obj, _ in units)}", ""]
    return "\n".join(lines)


def build_cpu(library, temp, workers):
    """Compiles csrc/cpu into `library` and returns its record.

    attention.cpp holds everything that depends on the instruction set and is compiled once for each; the other files
    run on every CPU, and choose among those at run time.
    """
    cxx, ninja, sources = find_compiler(), find_ninja(), sorted(CSRC.glob("cpu/*.cpp"))
    if not sources:
        raise CompileError("no C++ sources in csrc/cpu")
    isas = {isa: flags for isa, flags in ISAS.items() if accepts(cxx, flags)}
    if "baseline" not in isas:
        raise CompileError(f"{shlex.join(cxx)} does not work or rejects {shlex.join(CXX_FLAGS)}")
    have = [f"-DTSK_HAVE_{isa.upper()}=1" for isa in isas]
    units = [(source, temp / f"{source.stem}.o", have) for source in sources if source.stem != "attention"]
    for isa, flags in isas.items():
        units.append((CSRC / "cpu/attention.cpp", temp / f"attention_{isa}.o", [f"-DTSK_ISA={isa}", *flags]))
    temp.mkdir(parents=True, exist_ok=True)
    (temp / "build.ninja").write_text(ninja_file(cxx, library, units), encoding="utf-8")
    run = [ninja, "-C", str(temp), "-j", workers]
    done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error:" in line] or done.stdout.splitlines()
        raise CompileError(f"compilation failed: {errors[0] if errors else 'ninja said nothing'}")
    version = subprocess.check_output([*cxx, "--version"], encoding="utf-8", errors="replace").splitlines()[0]
    rejected = [isa for isa in ISAS if isa not in isas]
    return {"status": "ok", "compiler": version, "flags": CXX_FLAGS, "isas": isas, "isas_rejected": rejected}


def source_hash():
    """16 hex digits over the names and contents of csrc; a loader beside csrc can tell that a library is stale."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class NinjaBuildExt(build_ext):
    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"  # no Python tag: the library contains no Python

    def run(self):
        cuda, workers = cuda_status(), jobs()
        library = Path(self.get_ext_fullpath(CPU_LIBRARY)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        reason = None
        try:
            cpu = build_cpu(library, Path(self.build_temp).resolve() / "cpu", workers)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)  # a stale library must not outlive a failed build
            reason, cpu = error, {"status": f"skipped: {error}"}
        record = {"_cpu": cpu, "_cuda": {"status": cuda}, "source_hash": source_hash()}
        library.with_name(RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if reason and os.environ.get("TIMESFORMER_KERNELS_REQUIRE_NATIVE") == "1":
            raise CompileError(f"{CPU_LIBRARY} cannot be built: {reason}") from reason
        if reason:
            print(f"timesformer-kernels: WARNING: {CPU_LIBRARY} is left out: {reason}", file=sys.stderr)

    def get_output_mapping(self):
        """{path in build_lib: path in the source tree} of an in-place build; strict editable installs link these."""
        if not self.inplace:
            return {}
        made, built = Path(self.get_ext_fullpath(CPU_LIBRARY)), Path(self.build_lib, CPU_LIBRARY.split(".")[0])
        return {str(built / p.name): str(p) for p in (made, made.with_name(RECORD)) if p.exists()}


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(CPU_LIBRARY, [])],
    cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": AnyPythonWheel},
)
