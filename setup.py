# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries: a `build_ext` that drives ninja over a C++ compiler and nvcc and records what it did.

The libraries are plain C ABI, so the build needs neither torch nor Python headers and one wheel serves every Python 3.
A library that cannot be built is left out, with a warning and a reason in `_build_info.json`; the install goes on.

The CUDA library is built where there is nvcc, with or without a GPU: with one for its architecture alone.

Environment: CXX (compiler, may carry arguments), MAX_JOBS (parallel compilations, default 2),
TIMESFORMER_KERNELS_REQUIRE_NATIVE=1 (a library that cannot be built is an error), TIMESFORMER_KERNELS_CUDA=auto|0|1 (1:
no nvcc is an error), TIMESFORMER_KERNELS_CUDA_ARCHS ("80 90a"), CUDA_HOME (the toolkit, if not the one on PATH), and
nvcc's own, as NVCC_CCBIN (its C++ compiler).
"""

import hashlib
import json
import os
import platform
import re
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
CPU_LIBRARY, CUDA_LIBRARY = "timesformer_kernels._cpu", "timesformer_kernels._cuda"
RECORD = "_build_info.json"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2, "-mprefer-vector-width=512"]
PER_ISA = ("attention", "steps")  # sources that are compiled once for each of these
ONLY = {"amx": ("attention",)}  # of them, what an instruction set changes; the rest is that of the one before it
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
    if sys.platform == "linux":  # which lends the tiles' registers on request
        ISAS |= {"amx": [*ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]}

NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
NVCC_FLAGS += ["-Xlinker=--exclude-libs,ALL"]  # the CUDA run-time inside is not to be mixed up with torch's
CUDA_ARCHS = ("80", "90a", "100", "120")  # without a GPU to ask; kernels need 80
NO_NVCC = "no nvcc found (CUDA_HOME names a toolkit; searched otherwise: PATH, /usr/local/cuda)"
SPECIFIC = {"90": "90a"}  # instructions of that one architecture


def jobs():
    value = os.environ.get("MAX_JOBS") or str(min(2, os.cpu_count() or 1))
    if not value.isdigit() or value == "0":
        raise CompileError(f"MAX_JOBS must be a positive integer, got {value!r}")
    return value


def cuda_wanted():
    want = os.environ.get("TIMESFORMER_KERNELS_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise CompileError(f"TIMESFORMER_KERNELS_CUDA must be auto, 0 or 1, got {want!r}")
    return want


def find_nvcc():
    """Path of nvcc, None where there is none: in $CUDA_HOME if set, else on PATH or in /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def visible_gpus():
    """Architectures of the GPUs that nvidia-smi sees, as "90"; () where it is missing or sees none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else ()
    return tuple(sorted({major + minor for major, minor in found}, key=int))


def cuda_archs(nvcc):
    """(architectures to compile for, the one to include as PTX or None, why these)."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, encoding="utf-8", errors="replace")
    known = set(re.findall(r"sm_(\d+)", listed.stdout))  # variants as 90a go with 90, listed or not
    if not known:
        raise CompileError(f"{nvcc} --list-gpu-code lists nothing: {(listed.stderr or 'no error').strip()}")

    def usable(arch):
        number = re.fullmatch(r"(\d+)[af]?", arch)
        return number and number[1] in known and int(number[1]) >= 80

    if asked := re.findall(r"[^\s,;]+", os.environ.get("TIMESFORMER_KERNELS_CUDA_ARCHS", "")):
        if unknown := [arch for arch in asked if not usable(arch)]:
            have = " ".join(sorted(filter(usable, known), key=int))
            raise CompileError(f"TIMESFORMER_KERNELS_CUDA_ARCHS: got {unknown[0]!r}, this nvcc and we know {have}")
        return asked, None, "TIMESFORMER_KERNELS_CUDA_ARCHS"
    gpus = [SPECIFIC.get(arch, arch) for arch in visible_gpus() if int(arch) >= 80]
    if gpus and all(map(usable, gpus)):
        return gpus, None, "the visible GPUs"
    archs = list(filter(usable, CUDA_ARCHS))
    if not archs:
        raise CompileError(f"nvcc knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return archs, archs[0], "GPUs unknown to nvcc are visible" if gpus else "no GPU is visible"


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


def run_ninja(ninja, temp, text, workers):
    temp.mkdir(parents=True, exist_ok=True)
    (temp / "build.ninja").write_text(text, encoding="utf-8")
    run = [ninja, "-C", str(temp), "-j", workers]
    done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        errors = [
            line for line in done.stdout.splitlines() if "error:" in line or "nvcc fatal" in line
        ] or done.stdout.splitlines()
        raise CompileError(f"compilation failed: {errors[0] if errors else 'ninja said nothing'}")


def build_cpu(library, temp, workers):
    """Compiles csrc/cpu into `library` and returns its record.

    PER_ISA holds everything that depends on the instruction set and is compiled once for each; the other files run on
    every CPU, and choose among those at run time.
    """
    cxx, ninja, sources = find_compiler(), find_ninja(), sorted(CSRC.glob("cpu/*.cpp"))
    if not sources:
        raise CompileError("no C++ sources in csrc/cpu")
    isas = {isa: flags for isa, flags in ISAS.items() if accepts(cxx, flags)}
    if "baseline" not in isas:
        raise CompileError(f"{shlex.join(cxx)} does not work or rejects {shlex.join(CXX_FLAGS)}")
    have = [f"-DTSK_HAVE_{isa.upper()}=1" for isa in isas]
    units = [(source, temp / f"{source.stem}.o", have) for source in sources if source.stem not in PER_ISA]
    for isa, flags in isas.items():
        for stem in ONLY.get(isa, PER_ISA):
            units.append((CSRC / f"cpu/{stem}.cpp", temp / f"{stem}_{isa}.o", [f"-DTSK_ISA={isa}", *flags]))
    run_ninja(ninja, temp, ninja_file(cxx, library, units), workers)
    version = subprocess.check_output([*cxx, "--version"], encoding="utf-8", errors="replace").splitlines()[0]
    rejected = [isa for isa in ISAS if isa not in isas]
    return {"status": "ok", "compiler": version, "flags": CXX_FLAGS, "isas": isas, "isas_rejected": rejected}


def build_cuda(nvcc, library, temp, workers):
    """Compiles csrc/cuda/launch.cu, which includes all of it, into `library` and returns its record."""
    ninja, source, (archs, ptx, why) = find_ninja(), CSRC / "cuda/launch.cu", cuda_archs(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets += [f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else []
    flags = [*NVCC_FLAGS, *targets, f"--threads={workers}"]
    text = [f"rule nvcc\n  command = {command([nvcc, *flags])} -MD -MF launch.d -shared $in -o $out"]
    text += ["  depfile = launch.d", "  deps = gcc", f"build {escaped(library)}: nvcc {escaped(source)}", ""]
    run_ninja(ninja, temp, "\n".join(text), "1")
    lines = subprocess.check_output([nvcc, "--version"], encoding="utf-8", errors="replace").splitlines()
    version = next((line for line in lines if "release" in line), lines[-1])
    return {"status": "ok", "compiler": version, "flags": NVCC_FLAGS, "archs": archs, "ptx": ptx, "archs_from": why}


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
        want, workers, temp = cuda_wanted(), jobs(), Path(self.build_temp).resolve()
        nvcc = find_nvcc() if want != "0" else None
        if want == "1" and not nvcc:  # said before anything is compiled
            raise CompileError(f"{CUDA_LIBRARY} cannot be built: {NO_NVCC}")
        cpu = self.attempt(CPU_LIBRARY, lambda library: build_cpu(library, temp / "cpu", workers))
        if nvcc:
            cuda = self.attempt(CUDA_LIBRARY, lambda library: build_cuda(nvcc, library, temp / "cuda", workers))
        else:
            self.path_of(CUDA_LIBRARY).unlink(missing_ok=True)
            cuda = {"status": "skipped: " + ("TIMESFORMER_KERNELS_CUDA=0" if want == "0" else NO_NVCC)}
        record = {"_cpu": cpu, "_cuda": cuda, "source_hash": source_hash()}
        self.path_of(CPU_LIBRARY).with_name(RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        required = os.environ.get("TIMESFORMER_KERNELS_REQUIRE_NATIVE") == "1"
        for name, built, must in (
            (CPU_LIBRARY, cpu, required),
            (CUDA_LIBRARY, cuda, want == "1" or (required and nvcc)),
        ):
            if built["status"] != "ok" and must:
                raise CompileError(f"{name} cannot be built: {built['status'].removeprefix('skipped: ')}")
            archs = f" for {' '.join(built['archs'])} ({built['archs_from']})" if "archs" in built else ""
            print(f"timesformer-kernels: {name}: {built['status']}{archs}", file=sys.stderr)

    def path_of(self, name):
        return Path(self.get_ext_fullpath(name)).resolve()

    def attempt(self, name, build):
        """The record of build(path of the library), or of why it failed."""
        library = self.path_of(name)
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            return build(library)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)  # a stale library must not outlive a failed build
            return {"status": f"skipped: {error}"}

    def get_output_mapping(self):
        """{path in build_lib: path in the source tree} of an in-place build; strict editable installs link these."""
        if not self.inplace:
            return {}
        cpu, cuda = (Path(self.get_ext_fullpath(name)) for name in (CPU_LIBRARY, CUDA_LIBRARY))
        built = Path(self.build_lib, CPU_LIBRARY.split(".")[0])
        return {str(built / p.name): str(p) for p in (cpu, cuda, cpu.with_name(RECORD)) if p.exists()}


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(CPU_LIBRARY, [])],
    cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": AnyPythonWheel},
)
