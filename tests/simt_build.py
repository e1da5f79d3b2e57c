# SPDX-License-Identifier: Apache-2.0
"""The CUDA library built for the CPU: g++ compiles csrc/cuda over tests/simt, where every CUDA thread is a fiber.

`library()` gives the path; the same C functions as of the real library, and simt.h's own: `simt_seed(n)` chooses the
order in which threads run. A build is kept by the hash of its sources and shared by the processes of a test run.
`python simt_build.py [--sanitize]` builds and prints the path.
"""

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc/cuda/launch.cu"
FLAGS = ["-x", "c++", "-std=c++20", "-shared", "-fPIC", "-g1", "-I", str(ROOT / "tests/simt")]
# Products and sums are fused as nvcc fuses them: where a score must be rounded in both directions, a test can tell.
CONTRACTED = ["-O2", "-mfma", "-ffp-contract=fast"]
FAST = CONTRACTED
SANITIZED = [*CONTRACTED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]


def compiler() -> list[str] | None:
    """The C++ compiler as a command, None where there is none. It must know GNU extensions."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def _flags(sanitize: bool) -> list[str]:
    return [*FLAGS, *WARNINGS, *(SANITIZED if sanitize else FAST)]


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(repr(command).encode())
    for folder in ("csrc", "tests/simt"):
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cu")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def library(sanitize: bool = False) -> Path:
    """Path of the library, built on first use. Raises RuntimeError with the compiler's words where that fails."""
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler")
    command = [*found, *_flags(sanitize), str(SOURCE)]
    folder = Path(tempfile.gettempdir()) / f"timesformer_kernels_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to someone else")
    path = folder / f"{'asan' if sanitize else 'fast'}_{_key(command)}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers of a parallel run wait for the one that builds
        if not path.exists():
            for old in folder.glob(f"{path.name.split('_')[0]}_*.so"):
                old.unlink()
            part = path.with_suffix(".part")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
            part.rename(path)
    return path


def runtime(name: str) -> str:
    """Path of a sanitizer's library ("libasan.so"), to be preloaded into the Python that loads a sanitized build."""
    return subprocess.check_output([*compiler(), f"-print-file-name={name}"], text=True).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    print(library(parser.parse_args().sanitize))
