# SPDX-License-Identifier: Apache-2.0
"""Launches that overflow what is 16 or 32 bits wide elsewhere: sequences, elements of a tensor, offsets in a clip.

Single clips, or parts of a clip that are calls of their own, are compared with plain attention in float64.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch
from calls import Attention
from probe import Checks, backends_or_raise, options, without
from torch import Tensor

GIB = 2**30


def exact(packed: Tensor, dout: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Patches [N, T, 3, H, D] and dout [N, T, H, D] of one clip -> (out, gradient of packed), float64."""
    leaf = packed.double().requires_grad_()
    q, k, v = (leaf.transpose(0, 1) if scheme == "space" else leaf).movedim(-2, 1).unbind(3)  # [G, H, L, D]
    out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    out = out.movedim(1, 2)
    out = out.transpose(0, 1) if scheme == "space" else out
    return out.detach(), torch.autograd.grad(out, leaf, dout.double())[0]


def judge(name: str, got: Tensor, wanted: Tensor, limit: float) -> float:
    """Relative L2 error. Raises AssertionError where it is above the limit, or not a number."""
    got = got.double()
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= limit:
        raise AssertionError(f"{name}: relative error {error:.2e}, the limit is {limit:.0e}")
    return error


def places(clips: int, one: int) -> list[int]:
    """First and last clip, the middle, and those around element 2^31 of a tensor with `one` elements per clip."""
    edge = 2**31 // one
    return sorted({i for i in (0, clips // 2, edge - 1, edge, edge + 1, clips - 1) if 0 <= i < clips})


def many_clips(call: Attention, device: str, limit: float) -> str:
    """Each of some clips against float64, and bit by bit against a call on that clip alone; class mode "none"."""
    packed, dout = call.operands(device)
    out, grad = call.both(packed, dout)
    one, worst = replace(call, batch=1), 0.0
    height, width, frames = call.grid
    shape = (height * width, frames)
    for i in places(call.batch, packed[0].numel()):
        alone = one.both(packed[i : i + 1], dout[i : i + 1])
        if not (torch.equal(out[i], alone[0][0]) and torch.equal(grad[i], alone[1][0])):
            raise AssertionError(f"clip {i} differs from a call on that clip alone")
        wanted = exact(packed[i].unflatten(0, shape), dout[i].unflatten(0, shape), call.scheme)
        got = (out[i].unflatten(0, shape), grad[i].unflatten(0, shape))
        worst = max(worst, *(judge(f"clip {i}", a, b, limit) for a, b in zip(got, wanted, strict=True)))
    sequences = call.batch * (frames if call.scheme == "space" else height * width)
    return f"{sequences:,} sequences, {packed.numel():,} elements, relative error {worst:.1e}"


def long_clip(call: Attention, parts: tuple[int, ...], device: str, limit: float) -> str:
    """Some sequences of one clip, whose offsets need more than 32 bits, against float64; class mode "none"."""
    packed, dout = call.operands(device)
    out, grad = call.both(packed, dout)
    height, width, frames = call.grid
    axis = 1 if call.scheme == "space" else 0
    worst = 0.0
    at = torch.tensor(parts, device=device)
    pick = lambda x: x[0].unflatten(0, (height * width, frames)).index_select(axis, at)  # noqa: E731
    wanted = exact(pick(packed), pick(dout), call.scheme)
    for got, b in zip((pick(out), pick(grad)), wanted, strict=True):
        worst = max(worst, judge("sequences", got, b, limit))
    return f"offsets up to {packed.numel():,} elements in a clip, relative error {worst:.1e}"


def needed(call: Attention) -> int:
    """Bytes: packed and its gradient, dout, out, and what a check adds to them."""
    height, width, frames = call.grid
    return int(call.batch * height * width * frames * call.heads * call.head_dim * 2 * (3 + 3 + 1 + 1) * 1.3)


def main() -> int:
    args = options(__doc__.split(":")[0] + ".")
    checks, device = Checks(args.json, "launches"), "cpu" if args.cpu else "cuda"
    backends = backends_or_raise(checks, device, torch.bfloat16)
    dtype, limit = ("float32", 1e-5) if args.cpu else ("bfloat16", 2e-2)
    small = dict(dtype=dtype, heads=1, head_dim=16)
    if args.cpu:
        clips = [
            Attention("time", (1, 1, 4), "none", batch=3, **small),
            Attention("time", (2, 3, 4), "none", batch=3, **small),
            Attention("space", (2, 3, 4), "none", **small),
        ]
        long = [(Attention("space", (2, 3, 4), "none", batch=1, **small), (0, 3))]
    else:
        wide = dict(dtype=dtype, heads=12, head_dim=64)
        clips = [
            Attention("time", (1, 1, 4), "none", batch=70_000, **wide),  # clips past a grid of 65,535
            Attention("time", (14, 14, 8), "none", batch=512, **wide),  # sequences past it, 100,352
            Attention("space", (7, 7, 96), "none", batch=700, **wide),  # 67,200
            Attention("time", (14, 14, 8), "none", batch=2048, **wide),  # 2^31 elements in q, in k, in v
        ]
        long = [
            (Attention("time", (28, 28, 1280), "none", batch=1, **wide), (0, 391, 782, 783)),
            (Attention("space", (28, 28, 1280), "none", batch=1, **wide), (0, 640, 1278, 1279)),
        ]
    if args.quick:
        clips, long = clips[:2], long[:1]
    free = None if args.cpu else torch.cuda.mem_get_info()[0]
    left_out = []
    runs = [(call, many_clips, ()) for call in clips] + [(call, long_clip, (parts,)) for call, parts in long]
    for (call, run, parts), name in itertools.product(runs, backends):
        call = replace(call, backend=name)
        if free is not None and needed(call) > free:
            left_out.append(f"{call}: needs {needed(call) / GIB:.0f} GiB")
            continue
        with checks.check(str(call)) as say:
            say(run(call, *parts, device, limit))
        if not args.cpu:
            torch.cuda.empty_cache()
    checks.facts["left out"] = left_out
    more = f"; too little memory for {len(left_out)}" if left_out else ""
    return checks.end(
        f"{len(checks.found)} launches, clips and sequences checked against float64{more}{without(checks)}"
    )


if __name__ == "__main__":
    sys.exit(main())
