# SPDX-License-Identifier: Apache-2.0
"""Side streams, threads and several GPUs: a call runs where its caller is, after what was enqueued there before it."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import torch
from calls import AddLayerNorm, Attention, BiasGelu
from probe import Checks, backends_or_raise, options, without

DELAY = 50_000_000  # clock cycles, some 25 ms: a kernel that does not wait for them reads what was there before
THREADS = 4


def calls(backends: list[str], cpu: bool) -> list:
    size = dict(grid=(2, 3, 4), heads=2, head_dim=16, batch=1) if cpu else dict(grid=(14, 14, 8), heads=12, batch=2)
    kinds = [Attention("time", cls="exclude", **size), Attention("space", cls="per_group", **size)]
    if not cpu:
        kinds += [Attention("space", (28, 28, 2), "per_group", heads=12, batch=1)]
    width = 24 if cpu else 768
    steps = [AddLayerNorm(width=width), BiasGelu(width=width)] if "triton" in backends else []
    return [*(replace(call, backend=name) for name in backends for call in kinds), *steps]


def stream(cpu: bool, device="cuda"):
    """(stream or None, context in which it is the current one)"""
    if cpu:
        return None, nullcontext()
    side = torch.cuda.Stream(device)
    return side, torch.cuda.stream(side)


def same(got, expected) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a, b.to(a.device)):
            share = ((a != b.to(a.device)).float().mean()).item()
            raise AssertionError(f"result {i} differs from that of a call by itself in {share:.1%} of its elements")


def behind_a_delay(call, cpu: bool) -> None:
    """On a side stream, inputs that arrive late there; backward included, which autograd runs on the same stream."""
    device = "cpu" if cpu else "cuda"
    old, new = call.operands(device, 1), call.operands(device, 2)
    expected = [x.clone() for x in call.both(*new)]
    call.both(*old)
    if not cpu:
        torch.cuda.synchronize()
    side, current = stream(cpu)
    with current:
        if not cpu:
            torch.cuda._sleep(DELAY)
        for to, x in zip(old, new, strict=True):
            to.copy_(x)
        got = call.both(*old)
        if side is not None:
            side.synchronize()
    same(got, expected)


def at_once(kinds: list, cpu: bool) -> None:
    """Threads with a stream each, all calls in each, in another order in every thread."""
    device = "cpu" if cpu else "cuda"
    inputs = [call.operands(device, 3) for call in kinds]
    expected = [[x.clone() for x in call.both(*x)] for call, x in zip(kinds, inputs, strict=True)]
    if not cpu:
        torch.cuda.synchronize()
    errors = []

    def work(number: int) -> None:
        try:
            side, current = stream(cpu)
            with current:
                for i in range(number, number + len(kinds)):
                    at = i % len(kinds)
                    got = kinds[at].both(*inputs[at])
                    if side is not None:
                        side.synchronize()
                    same(got, expected[at])
        except Exception as error:
            errors.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1 if cpu else THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise AssertionError(errors[0])


def other_gpu(call, index: int) -> None:
    """On another GPU while the first one is current."""
    operands = call.operands("cuda:0", 4)
    expected = [x.cpu() for x in call.both(*operands)]
    with torch.cuda.device(0):
        got = call.both(*(x.to(f"cuda:{index}") for x in operands))
        if torch.cuda.current_device() != 0:
            raise AssertionError(f"the current device is {torch.cuda.current_device()} after the call, expected 0")
    for x in got:
        if x.get_device() != index:
            raise AssertionError(f"a result is on {x.device}, expected cuda:{index}")
    same([x.cpu() for x in got], expected)


def main() -> int:
    args = options(__doc__.split(":")[0] + ".")
    checks = Checks(args.json, "checks")
    kinds = calls(backends_or_raise(checks, "cpu" if args.cpu else "cuda", torch.bfloat16), args.cpu)
    for call in kinds:
        with checks.check(f"side stream, {call}"):
            behind_a_delay(call, args.cpu)
    with checks.check("threads"):
        at_once(kinds, args.cpu)
    gpus = 0 if args.cpu else torch.cuda.device_count()
    for index in range(1, gpus):
        for call in kinds:
            with checks.check(f"GPU {index}, {call}"):
                other_gpu(call, index)
    checks.facts["gpus"] = gpus
    several = f"{gpus} GPUs" if gpus > 1 else "several GPUs: not checked, there is one" if gpus else "no GPU"
    return checks.end(
        f"{len(kinds)} calls behind a delay, {THREADS if gpus else 1} threads; {several}{without(checks)}"
    )


if __name__ == "__main__":
    sys.exit(main())
