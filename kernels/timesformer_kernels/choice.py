# SPDX-License-Identifier: Apache-2.0
"""Which GPU backend `auto` takes for a shape, and why: rules in `choice.json`, of which the first that fits decides.

    {"architecture": "sm_90" or "any", "dtypes": ["bfloat16", ...], "head_dim": [first, last], "members": [first, last],
     "backend": name, "reason": {"expected": why} or {"measured": {"device", "date", "file", "ms", "ratio", "noise"}}}

members is M, the patches of a sequence and the class row where it takes part; null as the last has no end. A rule knows
no direction: the backward of a call reads what its forward kept, so both are one backend's. ms holds the milliseconds
of each backend by table of the benchmark, ratio how many times as long as the chosen one the other takes, in the
geometric mean over these tables, noise the largest of theirs. `scripts/choose_backend.py` makes such reasons; the
members of a rule without one are the lengths over which it will decide at once: a kernel of one kind serves them.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("choice.json")
ANY = "any"
MEASURED = ("device", "date", "file", "ms", "ratio", "noise")


class Rule(NamedTuple):
    architecture: str
    dtypes: tuple[str, ...]
    head_dim: tuple[int, int | None]
    members: tuple[int, int | None]
    backend: str
    reason: dict

    def __str__(self):
        kind = f"{self.architecture}, {', '.join(self.dtypes)}, head_dim {span(self.head_dim)}"
        return f"{kind}, {span(self.members)} members: {self.backend}, {why(self)}"


def span(limits: tuple[int, int | None]) -> str:
    """ "1 to 16", in words."""
    first, last = limits
    return f"{first}" if first == last else f"{first} or more" if last is None else f"{first} to {last}"


def _within(n: int, limits: tuple[int, int | None]) -> bool:
    return limits[0] <= n and (limits[1] is None or n <= limits[1])


def measured(rule: Rule) -> bool:
    return "measured" in rule.reason


def why(rule: Rule) -> str:
    """The reason of a rule in one line."""
    if not measured(rule):
        return f"expected, not measured: {rule.reason['expected']}"
    facts = rule.reason["measured"]
    count, others = len(facts["ms"]), {name for times in facts["ms"].values() for name in times} - {rule.backend}
    ratio = f"{facts['ratio']:.2f} times as fast as {', '.join(sorted(others))}"
    if tie(facts["ratio"], facts["noise"]):
        ratio += f", within the noise of {facts['noise']:.1%}"
    where = f"{count} table{'s' if count != 1 else ''} of {facts['file']}, {facts['device']}, {facts['date']}"
    return f"measured: {ratio} ({where})"


def tie(ratio: float, noise: float) -> bool:
    """Whether two times that differ by this factor might as well differ the other way round."""
    return abs(math.log(ratio)) <= math.log1p(noise)


def read(path: Path) -> tuple[Rule, ...]:
    """The rules of a file. Raises ValueError naming the rule that is none."""
    rules = []
    for i, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))["rules"]):
        try:
            if entry.keys() != set(Rule._fields):
                raise ValueError(f"got {', '.join(entry)}, expected {', '.join(Rule._fields)}")
            lists = {name: tuple(entry[name]) for name in ("dtypes", "head_dim", "members")}
            _check(rule := Rule(**{**entry, **lists}))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: rule {i}: {error}") from error
        rules.append(rule)
    return tuple(rules)


def _check(rule: Rule) -> None:
    for name in ("head_dim", "members"):
        first, last = getattr(rule, name)
        if type(first) is not int or first < 0 or (last is not None and (type(last) is not int or last < first)):
            raise ValueError(f"{name}: got {[first, last]}, expected [first, last] with 0 <= first <= last, or null")
    for name in rule.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtypes: got {name!r}, expected names of torch dtypes")
    kind, said = next(iter(rule.reason.items()), ("", None))
    known = {"expected": isinstance(said, str), "measured": isinstance(said, dict) and set(MEASURED) <= set(said)}
    if len(rule.reason) != 1 or not known.get(kind, False):
        raise ValueError(f"reason: got {rule.reason}, expected 'expected' and why, or 'measured' and its facts")


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Those of the package, read at the first call for a GPU."""
    return read(TABLE)


def fitting(rules: tuple[Rule, ...], architecture: str, dtype: torch.dtype, head_dim: int) -> list[Rule]:
    """The rules that speak of such tensors, of sequences of any length."""
    name = str(dtype).removeprefix("torch.")
    wanted = (ANY, architecture)
    return [r for r in rules if r.architecture in wanted and name in r.dtypes and _within(head_dim, r.head_dim)]


def find(rules: list[Rule], members: int) -> Rule | None:
    """The first that speaks of sequences of so many members."""
    return next((rule for rule in rules if _within(members, rule.members)), None)


def spans(rules: list[Rule]) -> list[tuple[int | None, Rule | None]]:
    """[(most members, the rule that decides up to there)], ascending; the last has no most, None, and no rule decides
    where that is None."""
    ends = {end for r in rules for end in (r.members[0] - 1, r.members[1]) if end is not None and end >= 0}
    beyond = max(ends, default=0) + 1
    return [(end, find(rules, end)) for end in sorted(ends)] + [(None, find(rules, beyond))]


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str | None:
    """A GPU's name in the rules, "sm_90" say, or "other" for one that is not there (of fake tensors), or not NVIDIA's;
    None for what is no GPU, of which no rule speaks."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "other"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return "other"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
