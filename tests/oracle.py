# SPDX-License-Identifier: Apache-2.0
"""Inputs, an independent attention oracle, and the one error bound. Shared by tests and benchmarks, never the reverse.

The oracle shares no code with the package: each scheme is an einops string over named token axes, each class-token
mode is spelled out with explicit concatenations. Run in float64 it is the exact answer; run in the dtype of the
kernel under test it is plain PyTorch ("eager"), whose error is the yardstick.

The rule (for out, dq, dk and dv), with F = ERROR_FACTOR:

    error(x)  <=  F * (error(eager) + eps(dtype of x) * max|exact|)

for the largest and the mean absolute error, and in relative L2 norm. A NaN on one side only fails.
"""

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, repeat

ERROR_FACTOR = 4.0  # stated once; 2 is too tight for dk on tiny shapes although nothing is wrong there

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = ("space_major", "time_major")
CLASS_MODES = ("none", "exclude", "per_group", "key", "global")

# scheme: (axes that make up height, width, time), groups, sequence. The axes of one token order concatenate to the
# row index; gh, gw, gt enumerate groups and lh, lw, lt run inside a sequence where an axis is split.
SCHEMES = {
    "time": (("h", "w", "t"), "h w", "t"),
    "space": (("h", "w", "t"), "t", "h w"),
    "joint": (("h", "w", "t"), "", "h w t"),
    "height": (("h", "w", "t"), "w t", "h"),
    "width": (("h", "w", "t"), "h t", "w"),
    "local": (("gh lh", "gw lw", "t"), "gh gw", "lh lw t"),  # 2 x 2 quadrants: contiguous halves
    "global": (("lh gh", "lw gw", "lt gt"), "gh gw gt", "lh lw lt"),  # parity classes: every second token
}


def device_of(backend):
    """Where tensors for a backend lie: on the GPU where it has kernels for one and there is one, else on the CPU.

    Triton's kernels then run in its interpreter: the same tests with and without a GPU.
    """
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def interpreted(backend):
    """Whether tests of the backend run in Triton's interpreter: slowly, one program after the other, on copies."""
    return backend == "triton" and device_of(backend) == "cpu"


def widest(backend):
    """The widest dtype a backend has kernels for."""
    return torch.float32 if backend in ("cuda", "triton") else torch.float64


@dataclass(frozen=True)
class Case:
    """Everything but the tensors of one call."""

    scheme: str
    grid: tuple[int, int, int]  # height, width, frames
    cls: str = "none"
    order: str = "space_major"
    scale: float | None = None
    weights: torch.Tensor | None = None  # (B, G) class-row weights, per_group only

    @property
    def tokens(self):
        """Rows of the token axis."""
        height, width, frames = self.grid
        return height * width * frames + (self.cls != "none")

    @property
    def groups(self):
        height, width, frames = self.grid
        return {
            "time": height * width,
            "space": frames,
            "joint": 1,
            "height": width * frames,
            "width": height * frames,
            "local": 4,
            "global": 8,
        }[self.scheme]

    def qkv(self, backend, batch, heads, head_dim, dtype=torch.float32, **kind):
        """make_qkv of the size of this case, where the backend wants its tensors."""
        return make_qkv(batch, self.tokens, heads, head_dim, dtype, device=device_of(backend), **kind)

    def on(self, backend):
        """The case with its weights where the backend wants them."""
        return self if self.weights is None else replace(self, weights=self.weights.to(device_of(backend)))

    def __str__(self):
        return f"{self.scheme}-{self.cls}-{self.order}-{'x'.join(map(str, self.grid))}"

    def options(self, **more):
        """Keyword arguments of grid_attention."""
        chosen = dict(grid=self.grid, scheme=self.scheme, cls=self.cls, order=self.order, scale=self.scale)
        if self.weights is not None:
            chosen["cls_weights"] = self.weights
        return {**chosen, **more}


def every_case(split_grid=(2, 4, 6), plain_grid=(3, 2, 5)):
    """Every scheme x class mode x token order; sizes differ, so that no two axes can be swapped unnoticed."""
    return [
        Case(scheme, split_grid if scheme in ("local", "global") else plain_grid, cls, order)
        for scheme in SCHEMES
        for cls in CLASS_MODES
        for order in ORDERS
    ]


def with_weights(case, batch, seed=7):
    """The case with class-row weights (B, G), float32: some zero, as a dropped path leaves them."""
    gen = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, case.groups, generator=gen)
    weights[:, ::3] *= 0 if case.groups > 1 else 1
    return replace(case, weights=weights)


def make_qkv(batch, tokens, heads=2, head_dim=8, dtype=torch.float32, *, seed=0, kind="random", device="cpu"):
    """q, k, v (B, S, H, D): strided on purpose, the unbound views of one packed (B, S, 3, H, D) tensor."""
    gen = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=gen, dtype=torch.float64)
    if kind == "large-logits":
        packed[:, :, 0] *= 30
    elif kind == "constant-rows":
        packed = packed[..., :1].expand(packed.shape).clone()
    elif kind == "one-hot":
        hot = torch.nn.functional.one_hot(packed.argmax(-1), head_dim)
        packed = hot.to(packed.dtype) * 4
    elif kind == "near-overflow":  # |q . k| stays just below 65504, the largest fp16; integers, summed without error
        packed[:, :, :2] = packed[:, :, :2].sign() * int((6.0e4 / head_dim) ** 0.5)
        packed[:, :, 2] *= 1000
    elif kind != "random":
        raise ValueError(f"kind: got {kind!r}")
    return list(packed.to(device, dtype).unbind(2))


def _split(x, case):
    """(class row (B, 1, H, D) or None, patches (B, G, L, H, D))."""
    cls, patches = (None, x) if case.cls == "none" else (x[:, :1], x[:, 1:])
    pattern, sizes = _pattern(case)
    return cls, rearrange(patches, pattern, **sizes)


def _pattern(case):
    (h, w, t), groups, sequence = SCHEMES[case.scheme]
    tokens = {"space_major": f"{h} {w} {t}", "time_major": f"{t} {h} {w}"}[case.order]
    height, width, frames = case.grid
    sizes = dict(zip("hwt", case.grid, strict=True))
    if case.scheme == "local":
        sizes = dict(gh=2, gw=2, lh=height // 2, lw=width // 2, t=frames)
    elif case.scheme == "global":
        sizes = dict(gh=2, gw=2, gt=2, lh=height // 2, lw=width // 2, lt=frames // 2)
    return f"b ({tokens}) n d -> b ({groups}) ({sequence}) n d", sizes


def _softmax_attend(q, k, v, scale, softmax):
    """(B, G, L, H, D) queries over (B, G, M, H, D) keys."""
    logits = einsum(q, k, "b g l n d, b g m n d -> b g n l m") * scale
    return einsum(softmax(logits, -1), v, "b g n l m, b g m n d -> b g l n d")


def attention(q, k, v, case, softmax=torch.softmax):
    """The oracle: (B, S, H, D) -> (B, S, H, D) in the dtype of its inputs, differentiable."""
    scale = q.shape[-1] ** -0.5 if case.scale is None else float(case.scale)
    (q_cls, q_tok), (k_cls, k_tok), (v_cls, v_tok) = (_split(x, case) for x in (q, k, v))
    groups = q_tok.shape[1]

    def with_cls(row, tokens):
        return torch.cat([repeat(row, "b 1 n d -> b g 1 n d", g=groups), tokens], 2)

    if case.cls in ("none", "exclude"):
        keys, values = k_tok, v_tok
    else:
        keys, values = with_cls(k_cls, k_tok), with_cls(v_cls, v_tok)
    out = _softmax_attend(with_cls(q_cls, q_tok) if case.cls == "per_group" else q_tok, keys, values, scale, softmax)
    if case.cls == "per_group":
        per_group, out = out[:, :, 0], out[:, :, 1:]
        if case.weights is None:
            row = per_group.mean(1)
        else:
            row = einsum(per_group, case.weights.to(q), "b g n d, b g -> b n d")
    elif case.cls == "global":
        row = _softmax_attend(q_cls[:, None], k[:, None], v[:, None], scale, softmax)[:, 0, 0]
    else:
        row = q.new_zeros(q.shape[0], *q.shape[2:])
    pattern, sizes = _pattern(case)
    left, right = pattern.split(" -> ")
    tokens = rearrange(out, f"{right} -> {left}", **sizes)
    return tokens if case.cls == "none" else torch.cat([row[:, None], tokens], 1)


def _rearranged(q, k, v, case, seed):
    """The oracle with the terms of its dot products permuted, the scale folded into q, and exp(x - log sum exp)."""
    order = torch.randperm(q.shape[-1], generator=torch.Generator().manual_seed(seed))
    scale = q.shape[-1] ** -0.5 if case.scale is None else float(case.scale)
    moved = ((q * scale)[..., order], k[..., order], v[..., order])
    out = attention(*moved, replace(case, scale=1.0), lambda x, dim: x.log_softmax(dim).exp())
    return out[..., order.argsort()]


def _plain(q, k, v, case, dout, exact):
    """[out, dq, dk, dv] of plain torch in the dtype of q.

    In float64 nothing more exact is at hand: there it is, element by element, the furthest of three rearrangements.
    """
    if q.dtype != torch.float64:
        return with_gradients(lambda *x: attention(*x, case), q, k, v, dout)
    furthest = exact
    for seed in range(3):
        others = with_gradients(lambda *x, s=seed: _rearranged(*x, case, s), q, k, v, dout)
        furthest = [
            torch.where((o - e).abs() > (f - e).abs(), o, f) for o, f, e in zip(others, furthest, exact, strict=True)
        ]
    return furthest


def with_gradients(run, q, k, v, dout):
    """[out, dq, dk, dv] of run(q, k, v) on leaves that share the inputs' memory and strides."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def make_dout(q, seed=1):
    """A gradient of q's shape and dtype."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(q.shape, generator=gen, dtype=torch.float64).to(q.device, q.dtype)


def assert_no_worse(name, actual, exact, eager):
    """The rule of this module's docstring; prints all numbers when it fails."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    mismatch = actual.isnan() != exact.isnan()
    assert not mismatch.any(), f"{name}: NaN on one side only, at {mismatch.nonzero()[:4].tolist()}"
    kept = ~exact.isnan()
    band = torch.finfo(actual.dtype).eps * exact[kept].abs().max()
    norm = exact[kept].norm()
    got, plain = ((x.double() - exact)[kept] for x in (actual, eager))
    for measure, size in (
        ("max", lambda error: error.abs().max()),
        ("mean", lambda error: error.abs().mean()),
        ("relative L2", lambda error: error.norm() / norm if norm > 0 else error.norm()),
    ):
        bound = ERROR_FACTOR * (size(plain) + band)
        assert size(got) <= bound, (
            f"{name}: {measure} error {size(got):.3e}, plain torch {size(plain):.3e} + {band:.1e}"
        )


def same(backend, a, b):
    """Bitwise equal. The reference alone may differ in last bits: torch's products depend on alignment and strides."""
    if backend == "reference":
        return bool(((a - b).abs() <= 16 * torch.finfo(a.dtype).eps * b.abs().max()).all())
    return torch.equal(a, b)


def others_serve(backend, tensors):
    """Whether other kernels of the backend, which add up in another order, serve these tensors than aligned ones."""
    rows = [(x.data_ptr(), *(n * x.element_size() for n in x.stride()[:3])) for x in tensors]
    return backend == "cuda" and tensors[0].element_size() == 2 and any(n % 16 for row in rows for n in row)


def check(run, q, k, v, case, dout=None, seed=1):
    """run(q, k, v) and its three gradients against the oracle in float64, by the rule."""
    dout = make_dout(q, seed) if dout is None else dout
    got = [x.cpu() for x in with_gradients(run, q, k, v, dout)]
    q, k, v, dout = (x.cpu() for x in (q, k, v, dout))  # one yardstick for every device
    wide = [x.double() for x in (q, k, v, dout)]
    exact = with_gradients(lambda *x: attention(*x, case), *wide)
    eager = _plain(q, k, v, case, dout, exact)
    for name, *trio in zip(("out", "dq", "dk", "dv"), got, exact, eager, strict=True):
        assert_no_worse(f"{name} of {case}", *trio)
