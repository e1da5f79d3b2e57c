# SPDX-License-Identifier: Apache-2.0
"""Mutants of the choice between GPU backends, and of the program that makes its rules."""

from mutants import GRID_PY, OPS_PY, PACKAGE, REGISTRY_PY, Mutant

CHOICE_PY, SCRIPT = f"{PACKAGE}/choice.py", "scripts/choose_backend.py"
TESTS = ("tests/test_choice.py",)

MUTANTS = [
    Mutant(
        "a backend loses its longest sequences",
        REGISTRY_PY,
        "if most is None or members <= most:",
        "if most is None or members < most:",
        TESTS,
    ),
    Mutant(
        "lengths compared that decide nothing",
        REGISTRY_PY,
        "                rungs.pop()",
        "                pass",
        TESTS,
    ),
    Mutant(
        "a rule obeyed although its backend cannot run",
        REGISTRY_PY,
        "next((b for b in able if rule is not None and b.name == rule.backend), able[0])",
        "get(rule.backend) if rule is not None else able[0]",
        TESTS,
    ),
    Mutant(
        "no rule obeyed",
        REGISTRY_PY,
        "next((b for b in able if rule is not None and b.name == rule.backend), able[0])",
        "able[0]",
        TESTS,
    ),
    Mutant(
        "explain speaks of the rule before",
        REGISTRY_PY,
        "first <= view.members and (most is None or view.members <= most)",
        "first <= view.members",
        TESTS,
    ),
    Mutant(
        "explain hides why the rule's backend cannot run",
        REGISTRY_PY,
        "    if backend.name == rule.backend:",
        "    if True:",
        TESTS,
    ),
    Mutant(
        "the backward of an op takes another backend",
        OPS_PY,
        "_backend(q, backend, view).backward(",
        "_backend(q, backend, None).backward(",
        TESTS,
    ),
    Mutant(
        "a fake call takes another backend",
        OPS_PY,
        'chosen = _backend(q, backend, view) if backend == "auto"',
        'chosen = _backend(q, backend, None) if backend == "auto"',
        TESTS,
    ),
    Mutant(
        "a class row that takes no part is a member",
        GRID_PY,
        'self.length + int(self.cls not in ("none", "exclude"))',
        'self.length + int(self.cls not in ("none",))',
        TESTS,
    ),
    Mutant(
        "a rule begins one member late",
        CHOICE_PY,
        "(r.members[0] - 1, r.members[1])",
        "(r.members[0], r.members[1])",
        TESTS,
    ),
    Mutant("rules of every architecture", CHOICE_PY, "if r.architecture in wanted and name", "if name", TESTS),
    Mutant("rules of every dtype", CHOICE_PY, "in wanted and name in r.dtypes and", "in wanted and", TESTS),
    Mutant("rules of every head_dim", CHOICE_PY, " and _within(head_dim, r.head_dim)]", "]", TESTS),
    Mutant("another GPU's architecture", CHOICE_PY, "get_device_capability(index)", "get_device_capability(0)", TESTS),
    Mutant("a fake's GPU is asked", CHOICE_PY, "if index >= torch.cuda.device_count():", "if False:", TESTS),
    Mutant("no tie", CHOICE_PY, "abs(math.log(ratio)) <= math.log1p(noise)", "False", TESTS),
    Mutant("a tie that is faster alone", CHOICE_PY, "abs(math.log(ratio))", "math.log(ratio)", TESTS),
    Mutant(
        "the slower one chosen", SCRIPT, "best = min(ROWS, key=means.get)", "best = max(ROWS, key=means.get)", TESTS
    ),
    Mutant("a tie changes the choice", SCRIPT, "        best = present.backend", "        pass", TESTS),
    Mutant("a graph compared with a plain call", SCRIPT, "if all(ms.values()):", "if any(ms.values()):", TESTS),
    Mutant("space without its class row", SCRIPT, 'info["locations"] + 1', 'info["locations"]', TESTS),
    Mutant("a rehearsal decides", SCRIPT, ' or info["shape"].startswith("tiny")', "", TESTS),
    Mutant("a CPU decides", SCRIPT, ' or info["device"] != "cuda"', "", TESTS),
    Mutant(
        "one head_dim decides for all",
        SCRIPT,
        "span = (first.head_dim, first.head_dim)",
        "span = present.head_dim",
        TESTS,
    ),
    Mutant("one length decides for all", SCRIPT, "span, present.members, best", "span, (0, None), best", TESTS),
    Mutant("earlier measurements lost", SCRIPT, ", *filter(choice.measured, old)]", "]", TESTS),
    Mutant("a measured rule doubled", SCRIPT, "if rule[:4] not in made]", "]", TESTS),
    Mutant(
        "the first of two measurements counts",
        SCRIPT,
        "for table in found}  # measured",
        "for table in found[::-1]}  # measured",
        TESTS,
    ),
]
