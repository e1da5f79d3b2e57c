# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: captured once, replayed on new inputs, and compared bit by bit with plain calls on the same inputs.

Without a GPU a stand-in for the graph calls again, so that all else runs.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch
from calls import AddLayerNorm, Attention, BiasGelu
from probe import Checks, backends_or_raise, options, without

from timesformer import DividedSTAttention, TimeSformer
from timesformer.benchmarking.timing import capture, tensors

SEEDS = (1, 2, 3)  # of the inputs of the replays


class Again:
    """A CPU's stand-in for a graph: the call itself, results into the same tensors."""

    def __init__(self, call, outputs):
        self.call, self.outputs = call, outputs

    def replay(self):
        for to, x in zip(self.outputs, tensors(self.call()), strict=True):
            to.copy_(x.detach())


def captured(call, cpu: bool):
    """(graph, its outputs)"""
    if not cpu:
        return capture(call)
    outputs = tuple(x.detach().clone() for x in tensors(call()))
    return Again(call, outputs), outputs


def difference(got, expected) -> float:
    """Largest difference as a share of the largest value; 0 for the same bits, NaN where either holds one."""
    if all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
        return 0.0
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, expected, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def replayed(call, operands: list, fresh, cpu: bool) -> float:
    """The worst difference of some replays, each on new inputs from fresh(seed), from eager calls on these."""
    graph, outputs = captured(call, cpu)
    worst = 0.0
    for seed in SEEDS[: 1 if cpu else None]:
        new = fresh(seed)
        with torch.no_grad():
            for to, x in zip(operands, new, strict=True):
                to.copy_(x)
            for out in outputs:
                out.fill_(float("nan"))  # a kernel that escaped the capture leaves it
        graph.replay()
        got = [x.detach().clone() for x in outputs]
        error = difference(got, [x.detach() for x in tensors(call())])
        worst = error if not error <= worst else worst
    return worst


def kernels(checks: Checks, backends: list[str], cpu: bool, quick: bool) -> None:
    device = "cpu" if cpu else "cuda"
    size = dict(grid=(2, 3, 4), heads=2, head_dim=16, batch=1) if cpu else dict(grid=(14, 14, 8), heads=12, batch=8)
    calls = [Attention("time", cls="exclude", **size), Attention("space", cls="per_group", **size)]
    if not cpu and not quick:
        calls += [Attention("time", cls="exclude", dtype="float32", **size)]
        calls += [
            Attention("space", (28, 28, 8), "per_group", heads=12, batch=1),
            Attention("joint", (7, 7, 4), "global"),
        ]
    wide = dict(width=24) if cpu else dict(width=768, rows=1569)
    steps = [AddLayerNorm(**wide), BiasGelu(**wide)] if "triton" in backends else []
    for call in [*(replace(call, backend=name) for name in backends for call in calls), *steps]:
        for name, run in (("forward", call.forward), ("forward+backward", call.both)):
            with checks.check(f"{call}, {name}") as say:
                operands = call.operands(device)
                fresh = lambda seed, call=call: call.operands(device, seed)  # noqa: E731
                with torch.set_grad_enabled(name != "forward"):
                    error = replayed(lambda run=run, x=operands: run(*x), operands, fresh, cpu)
                say(f"differs by {error:.1e}" if error else "the same bits", error=error)
                if error != 0:  # NaN too
                    raise AssertionError(f"replay and eager differ by {error:.1e}, expected the same bits")


def model(checks: Checks, backends: list[str], cpu: bool) -> None:
    """A limit, not bits: matrix products are cuBLAS's, whose choice of algorithm may depend on a stream's workspace."""
    device, dtype = ("cpu", torch.float32) if cpu else ("cuda", torch.bfloat16)
    sizes = dict(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5) if cpu else {}
    torch.manual_seed(0)
    net = TimeSformer(**sizes, num_frames=2 if cpu else 8, drop_path_rate=0.0).to(device, dtype)
    clip = (1, 3, 2, 32, 32) if cpu else (2, 3, 8, 224, 224)

    def fresh(seed):
        return [torch.randn(clip, generator=torch.Generator().manual_seed(seed)).to(device, dtype)]

    limit = 4 * torch.finfo(dtype).eps
    video, parameters = fresh(0)[0], list(net.parameters())

    def both():
        logits = net(video)
        return (logits, *torch.autograd.grad(logits.float().logsumexp(-1).sum(), parameters))

    directions = (("forward", lambda: net(video)), ("forward+backward", both))
    for backend, (name, run) in itertools.product(backends, directions):
        net.set_backend(backend)
        net.train(name != "forward")
        with checks.check(f"{backend}: TimeSformer, {name}") as say, torch.set_grad_enabled(name != "forward"):
            error = replayed(run, [video], fresh, cpu)
            say(f"differs by {error:.1e} of the largest value" if error else "the same bits", error=error)
            if not error <= limit:
                raise AssertionError(f"replay and eager differ by {error:.1e}, the limit is {limit:.1e}")


def half_block(checks: Checks, backends: list[str], cpu: bool) -> None:
    """After a plain call on another stream, as benchmarks do; with gradients of the tokens and of all parameters."""
    device, dtype, frames = ("cpu", torch.float32, 2) if cpu else ("cuda", torch.bfloat16, 8)
    torch.manual_seed(0)
    block = DividedSTAttention(*((32, 2) if cpu else (768, 12))).to(device, dtype)
    rows, width = 1 + frames * (4 if cpu else 196), 32 if cpu else 768
    limit, parameters = 4 * torch.finfo(dtype).eps, list(block.parameters())

    def fresh(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(2, rows, width, generator=generator).to(device, dtype) for _ in range(2)]

    x, dout = fresh(0)
    x.requires_grad_()

    def both():
        out = block(x, frames)
        return (out, *torch.autograd.grad(out, [x, *parameters], dout))

    for backend in backends:
        block.backend = backend
        with checks.check(f"{backend}: half-block, forward+backward after a plain call") as say, torch.enable_grad():
            both()
            error = replayed(both, [x, dout], fresh, cpu)
            say(f"differs by {error:.1e} of the largest value" if error else "the same bits", error=error)
            if not error <= limit:
                raise AssertionError(f"replay and eager differ by {error:.1e}, the limit is {limit:.1e}")


def main() -> int:
    args = options(__doc__.split(",")[0] + ".")
    checks = Checks(args.json, "captures")
    backends = backends_or_raise(checks, "cpu" if args.cpu else "cuda", torch.bfloat16)
    kernels(checks, backends, args.cpu, args.quick)
    half_block(checks, backends, args.cpu)
    model(checks, backends, args.cpu)
    same = sum(not check.get("error", 1) for check in checks.found.values())
    return checks.end(f"{len(checks.found)} captures replayed: {same} with the bits of eager{without(checks)}")


if __name__ == "__main__":
    sys.exit(main())
