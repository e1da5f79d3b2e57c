# SPDX-License-Identifier: Apache-2.0
"""The design as rules: imports point down the floors only, native code stays plain, files stay small and clean."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "timesformer_kernels"
MODEL = ROOT / "timesformer"

# Modules of the kernels package by floor; imports point down. native.py packs a grid.View, so it lies above grid.py.
FLOORS = {
    "grid": 0,
    "mounting": 0,
    "choice": 0,
    "fused_checks": 1,
    "registry": 1,
    "native": 1,
    "native_steps": 1.5,  # calls what native loads
    "native_cuda": 1.5,  # calls what native loads
    "backends": 2,
    "flops": 2,
    "ops": 3,
    "fused": 3,
    "info": 4,
}
FLOORS |= {"warmup": 4, "__init__": 4}
OPTIONAL = {"av", "tqdm", "transformers", "safetensors", "huggingface_hub", "matplotlib", "triton", "PIL", "cv2"}
OPTIONAL |= {"onnx", "onnxscript", "onnxruntime"}


def imports(path, top_level_only=False):
    """(level, module) of every import; level 0 is absolute, 1 is the file's own package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for s in tree.body for n in ([s] if _is_import(s) else [])] if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def _is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def python_files(*folders):
    return [path for folder in folders for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


def absolute_tops(path, **kwargs):
    return {module.split(".")[0] for level, module in imports(path, **kwargs) if level == 0}


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(KERNELS), ids=ids)
def test_kernels_import_neither_the_model_nor_themselves_by_name(path):
    """Relative imports only: the package also loads from outside the import path."""
    assert not absolute_tops(path) & {"timesformer", "timesformer_kernels", "tests", "benchmarks"}


def own_floor(path):
    parts = path.relative_to(KERNELS).with_suffix("").parts
    return FLOORS[parts[0]]


def imported_modules(path):
    """First names, below the package, of the package's modules that a file imports."""
    depth = len(path.relative_to(KERNELS).parts)  # 1 for a file of the package, 2 for a backend
    for level, module in imports(path):
        if level == depth:
            yield module.split(".")[0]
        elif 0 < level < depth:
            yield "backends"


@pytest.mark.parametrize("path", python_files(KERNELS), ids=ids)
def test_kernel_imports_point_down(path):
    for module in imported_modules(path):
        if (KERNELS / f"{module}.py").exists() or (KERNELS / module).is_dir():
            same = KERNELS / "backends" in path.parents or FLOORS[module] == own_floor(path) == 4
            assert FLOORS[module] < own_floor(path) or same, f"{ids(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in python_files(KERNELS / "backends") if p.stem != "__init__"], ids=ids)
def test_backends_import_neither_one_another_nor_ops(path):
    names = {p.stem for p in (KERNELS / "backends").iterdir()} - {"__init__", "__pycache__"}
    depth = len(path.relative_to(KERNELS / "backends").parts)  # 2 for a file of backends/triton
    for level, module in imports(path):
        first = module.split(".")[0]
        assert not (level == depth and first in names), f"imports the backend {first}"
        assert not (level == depth + 1 and first in ("ops", "fused", "backends", "info")), f"imports {first}"


@pytest.mark.parametrize(
    "path", [KERNELS / f"{name}.py" for name in ("grid", "choice", "registry", "native", "native_cuda")], ids=ids
)
def test_floor_one_needs_torch_and_the_standard_library_only(path):
    assert absolute_tops(path) <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", python_files(KERNELS, MODEL), ids=ids)
def test_optional_dependencies_are_imported_lazily(path):
    found = absolute_tops(path, top_level_only=True) & OPTIONAL
    if path.parent == KERNELS / "backends/triton" and path.stem not in ("__init__", "regimes"):
        found -= {"triton"}  # the modules that the package imports at its first call
    assert not found


@pytest.mark.parametrize("path", python_files(MODEL), ids=ids)
def test_the_model_uses_the_kernels_by_their_public_modules(path):
    """No model file reaches for ctypes, the ops or a fused backend: it calls the public functions."""
    assert "ctypes" not in absolute_tops(path)
    for _, module in imports(path):
        assert not re.match(r"timesformer_kernels\.(ops|backends\.(?!reference))", module), module


def test_importing_does_nothing_heavy():
    code = "import sys, timesformer_kernels; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stderr == ""
    assert not set(loaded.stdout.split()) & (OPTIONAL - {"tqdm", "PIL"})  # torch itself may pull these two


@pytest.mark.parametrize("folder", ["kernels", "tests", "benchmarks"])
def test_no_init_file(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_and_benchmarks_share_in_one_direction():
    for path in python_files(ROOT / "tests"):
        assert not {"benchmarks", "peers"} & absolute_tops(path), ids(path)


# Text rules over everything a reader of the repository sees

TEXT = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".yaml", ".in", ".sh"}
SKIP = {"build", "dist", "node_modules"}


def text_files():
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(
            part.startswith(".") and part != ".ci" or part in SKIP or part.endswith(".egg-info") for part in parts
        )
        if path.is_file() and not hidden and (path.suffix in TEXT or parts[0] == ".ci"):
            yield path


SOURCES = [path for path in text_files() if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]


@pytest.mark.parametrize("path", [p for p in SOURCES if ROOT / "csrc" in p.parents], ids=ids)
def test_native_code_has_no_torch_or_python_headers(path):
    headers = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"))
    for header in headers:
        assert not re.match(r"(torch|ATen|c10|pybind11|Python\.h|nanobind|omp\.h)", header), header


def test_the_abi_structs_are_mirrored_once():
    layout = re.compile(r"ctypes\.Structure|struct\.Struct|struct\.pack")
    mirrors = [p for p in python_files(ROOT / "kernels", MODEL) if layout.search(p.read_text(encoding="utf-8"))]
    assert {path.stem for path in mirrors} == {"native", "native_steps"}  # attention, the fused steps


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_first_line_is_the_licence(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines[lines[0].startswith("#!")] in (f"{mark} SPDX-License-Identifier: Apache-2.0" for mark in ("#", "//"))


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_files_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600  # 400 is the aim


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_no_open_ends(path):
    """A TODO needs an anchor that says when it is due."""
    if path != Path(__file__):
        assert not re.findall(r"(?:TODO|FIXME|XXX)(?!\()", path.read_text(encoding="utf-8"))


MACHINE = re.compile(r"(?<![\w.])/(?:home|root|Users|mnt|work|tmp|opt)/\w")


@pytest.mark.parametrize("path", [p for p in text_files() if p != Path(__file__)], ids=ids)
def test_no_machine_paths(path):
    found = MACHINE.search(path.read_text(encoding="utf-8"))
    assert not found, found.group()


@pytest.mark.parametrize("path", python_files(KERNELS), ids=ids)
def test_no_hidden_copies_of_the_operands(path):
    """q, k and v are read where they lie."""
    assert not re.findall(r"\b[qkv]\.contiguous\(", path.read_text(encoding="utf-8"))
