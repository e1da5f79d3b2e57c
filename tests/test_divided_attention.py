# SPDX-License-Identifier: Apache-2.0
"""DividedSTAttention and JointSTAttention against an independent block: values, gradients, drop path, dropout."""

from functools import partial

import blocks
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timesformer import DividedSTAttention, JointSTAttention
from timesformer_kernels import registry

pytestmark = pytest.mark.needs(dtype=torch.float64, device="cpu")  # what the tests of this file ask of a backend

EXACT = dict(rtol=1e-10, atol=1e-11)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(kind, generator, dtype=torch.float64, **options):
    return blocks.randomise(kind(**options).to(dtype), generator)


def tokens(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(module, frames, oracle, x, generator):
    """Output, input gradient and every parameter gradient of module(x, frames) against oracle(p, x)."""
    p = blocks.parameters_of(module)
    x, x_oracle = (x.clone().requires_grad_() for _ in range(2))
    out = module(x, frames)
    exact = oracle(p, x_oracle)
    weight = tokens(generator, *out.shape)
    (out * weight).sum().backward()
    (exact * weight).sum().backward()
    torch.testing.assert_close(out, exact, **EXACT)
    torch.testing.assert_close(x.grad, x_oracle.grad, **EXACT)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, msg=partial("{}: {}".format, name), **EXACT)


@pytest.mark.parametrize(
    "batch, patches, frames, heads, dim",
    [
        pytest.param(2, 6, 4, 4, 32, id="B2-N6-T4"),
        pytest.param(1, 1, 5, 2, 16, id="one-location"),
        pytest.param(3, 7, 1, 1, 16, id="one-frame"),
        pytest.param(1, 5, 3, 3, 60, id="head-dim-20"),
        pytest.param(1, 9, 17, 2, 128, id="T17-head-dim-64"),
    ],
)
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no-cls"])
def test_divided(backend, generator, batch, patches, frames, heads, dim, cls):
    module = make(DividedSTAttention, generator, dim=dim, num_heads=heads, class_token=cls, backend=backend)
    x = tokens(generator, batch, cls + patches * frames, dim)
    compare(module, frames, lambda p, x: blocks.divided(p, "", x, frames, heads, cls), x, generator)
    with torch.no_grad():  # the other way to add a residual
        exact = blocks.divided(blocks.parameters_of(module), "", x, frames, heads, cls)
        before = x.clone()
        torch.testing.assert_close(module(x, frames), exact, **EXACT)
        assert torch.equal(x, before)


def test_joint(backend, generator):
    module = make(JointSTAttention, generator, dim=32, num_heads=4, backend=backend)
    compare(module, 3, lambda p, x: blocks.joint(p, "", x, 4), tokens(generator, 2, 1 + 5 * 3, 32), generator)


def test_softmax_of_these_tests_is_peaked(generator):
    """The oracle's own guard: a model that groups tokens wrongly must be far away, not within a tolerance."""
    module = make(DividedSTAttention, generator, dim=32, num_heads=4)
    p, x = blocks.parameters_of(module), tokens(generator, 2, 1 + 6 * 6, 32)
    right = blocks.divided(p, "", x, 6, 4)
    swapped = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (6, 6)).transpose(1, 2).flatten(1, 2)], 1)
    wrong = blocks.divided(p, "", swapped, 6, 4)
    wrong = torch.cat([wrong[:, :1], wrong[:, 1:].unflatten(1, (6, 6)).transpose(1, 2).flatten(1, 2)], 1)
    assert (right - wrong).norm() > 0.3 * (right - x).norm()


def test_folding(generator):
    """Inference joins proj and temporal_fc into one product, unless someone looks at or has replaced either."""

    class Loud(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            Loud.calls += 1
            return super().forward(x)

    module = make(DividedSTAttention, generator, dim=16, num_heads=2)
    x = tokens(generator, 2, 41, 16)
    exact = blocks.divided(blocks.parameters_of(module), "", x, 4, 2)
    with torch.no_grad():
        assert module._folds(x) and not module._folds(x[:1, :13])  # too few rows to pay for the fold
        torch.testing.assert_close(module(x, 4), exact, **EXACT)
        seen = []
        handle = module.temporal_attn.proj.register_forward_hook(lambda m, args, out: seen.append(out))
        torch.testing.assert_close(module(x, 4), exact, **EXACT)
        assert len(seen) == 1
        handle.remove()
        loud = Loud(16, 16).double()
        loud.load_state_dict(module.temporal_fc.state_dict())
        module.temporal_fc = loud
        torch.testing.assert_close(module(x, 4), exact, **EXACT)
        assert Loud.calls == 1


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("kind", [DividedSTAttention, JointSTAttention], ids=["divided", "joint"])
def test_class_row_alone(backend, generator, kind, drop_path):
    module = make(kind, generator, dim=16, num_heads=2, drop_path=drop_path, backend=backend)
    x = tokens(generator, 5, 13, 16).requires_grad_()
    results = []
    for only in (True, False):
        torch.manual_seed(3)
        out = module(x, 4, class_row_only=only)
        assert out.shape == (5, 1 if only else 13, 16)
        results.append((out[:, 0], *torch.autograd.grad(out[:, 0].square().sum(), (x, *module.parameters()))))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, **EXACT)


@pytest.mark.parametrize("option", [dict(qkv_bias=False), dict(qk_scale=0.7), dict(layer_norm_eps=1e-2)], ids=str)
def test_options(generator, option):
    module = make(DividedSTAttention, generator, dim=24, num_heads=3, **option)
    assert (module.attn.qkv.bias is None) == (module.temporal_attn.qkv.bias is None) == ("qkv_bias" in option)
    x, p = tokens(generator, 2, 13, 24), blocks.parameters_of(module)
    if "layer_norm_eps" in option:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "norm", partial(blocks.norm, eps=1e-2))
            exact = blocks.divided(p, "", x, 4, 3)
        assert (exact - blocks.divided(p, "", x, 4, 3)).abs().max() > 1e-4
    else:
        exact = blocks.divided(p, "", x, 4, 3, scale=option.get("qk_scale"))
    torch.testing.assert_close(module(x, 4), exact, **EXACT)


# --- stochastic depth ------------------------------------------------------------------------------------------------


def recorded(module):
    """Let module.drop_path keep what it draws."""
    drawn, draw = [], module.drop_path.draw

    def keep(*shape, like):
        drawn.append(draw(*shape, like=like))
        return drawn[-1]

    module.drop_path.draw = keep
    return drawn


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_drop_path(backend, generator, cls, grad):
    torch.manual_seed(2)
    batch, patches, frames, heads = 4, 5, 3, 2
    module = make(
        DividedSTAttention, generator, dim=32, num_heads=heads, drop_path=0.5, class_token=cls, backend=backend
    )
    drawn = recorded(module)
    x = tokens(generator, batch, cls + patches * frames, 32)

    def oracle(p, x):
        time, space = drawn
        assert time.shape == (batch, patches, 1) and space.shape == (batch, frames)
        return blocks.divided(p, "", x, frames, heads, cls, time[..., 0], space)

    if grad:
        compare(module, frames, oracle, x, generator)
    else:
        with torch.no_grad():
            torch.testing.assert_close(module(x, frames), oracle(blocks.parameters_of(module), x), **EXACT)
    assert {0.0, 2.0} == set(drawn[0].flatten().tolist()) == set(drawn[1].flatten().tolist())


def test_clip_that_loses_every_frame(backend, generator):
    """No weight is left for its class row: it is exactly the input's, biases included, and gradients are finite."""
    module = make(DividedSTAttention, generator, dim=16, num_heads=2, drop_path=0.5, backend=backend)
    module.drop_path.draw = lambda *shape, like: like.new_zeros(shape)
    x = tokens(generator, 2, 9, 16).requires_grad_()
    out = module(x, 4)
    assert torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(out[:, 1:] - x[:, 1:], module.temporal_fc.bias.expand(2, 8, 16))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_drop_path_rate_and_scale():
    torch.manual_seed(0)
    module = DividedSTAttention(8, 1, drop_path=0.25)
    drawn = module.drop_path.draw(200, 200, like=torch.zeros((), dtype=torch.float64))
    assert set(drawn.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(drawn.mean() - 1) < 0.02
    assert module.drop_path.active and not module.eval().drop_path.active


def test_joint_drop_path(backend, generator):
    torch.manual_seed(1)
    module = make(JointSTAttention, generator, dim=16, num_heads=2, drop_path=0.5, backend=backend)
    drawn = recorded(module)
    x = tokens(generator, 6, 7, 16)
    compare(module, 3, lambda p, x: blocks.joint(p, "", x, 2, drawn[0].flatten()), x, generator)
    assert drawn[0].shape == (6, 1, 1) and set(drawn[0].flatten().tolist()) == {0.0, 2.0}


# --- dropout ---------------------------------------------------------------------------------------------------------


def without_time(generator, **options):
    module = make(DividedSTAttention, generator, **options)
    torch.nn.init.zeros_(module.temporal_fc.weight)
    torch.nn.init.zeros_(module.temporal_fc.bias)
    return module


def test_projection_dropout_acts_on_each_frames_class_row(generator):
    """With two frames and rate 1/2 every element of the class row gains 0, one frame's output, the other's, or both."""
    torch.manual_seed(0)
    module = without_time(generator, dim=16, num_heads=2, proj_drop=0.5)
    x = tokens(generator, 1, 1 + 3 * 2, 16)
    p = blocks.parameters_of(module)
    with torch.no_grad():
        single = [torch.cat([x[:, :1], x[:, 1 + t :: 2]], 1) for t in range(2)]
        first, second = (blocks.joint(p, "", y, 2) - y for y in single)
        gain = (module(x.expand(64, -1, -1), 2) - x)[:, 0]
        patch = (module(x.expand(64, -1, -1), 2) - x)[:, 1::2]
    a, b = first[0, 0], second[0, 0]
    cases = torch.stack([0 * a, a, b, a + b])
    hits = (gain[:, None] - cases).abs() < 1e-12
    assert (hits.sum(1) == 1).all()
    assert (hits.double().mean((0, 2)) - 0.25).abs().max() < 0.05
    kept = (patch - 2 * first[:, 1:]).abs() < 1e-12
    assert (kept | (patch.abs() < 1e-12)).all() and abs(kept.double().mean() - 0.5) < 0.05


def test_dropout_is_unbiased(generator):
    """Attention and projection dropout of one step keep the expected output of evaluation mode."""
    torch.manual_seed(0)
    module = without_time(generator, dim=16, num_heads=2, attn_drop=0.3, proj_drop=0.2)
    x = tokens(generator, 1, 1 + 3 * 2, 16)
    with torch.no_grad():
        samples = module(x.expand(8192, -1, -1), 2)
        error = samples.mean(0) - module.eval()(x, 2)[0]
    assert samples.var(0).min() > 0
    assert (error.abs() < 5 * (samples.var(0) / len(samples)).sqrt()).all()


def test_dropout_of_probabilities_in_time(generator):
    """Two frames, rate 1/2, one head: a patch gets 0, 2 p1 v1, 2 p2 v2 or their sum."""
    torch.manual_seed(0)
    module = make(DividedSTAttention, generator, dim=8, num_heads=1, attn_drop=0.5)
    torch.nn.init.zeros_(module.attn.proj.weight)
    torch.nn.init.zeros_(module.attn.proj.bias)
    x = tokens(generator, 1, 3, 8)
    p = blocks.parameters_of(module)
    with torch.no_grad():
        q, k, v = blocks.linear(p, "temporal_attn.qkv", blocks.norm(p, "temporal_norm1", x[:, 1:])).chunk(3, -1)
        prob = (q @ k.mT * 8**-0.5).softmax(-1)  # [1, 2, 2]
        terms = 2 * prob[0, 0, :, None] * v[0]  # what each frame gives to frame 0, if kept
        cases = torch.stack([0 * terms[0], terms[0], terms[1], terms.sum(0)])
        cases = blocks.linear(p, "temporal_fc", blocks.linear(p, "temporal_attn.proj", cases))
        gain = (module(x.expand(256, -1, -1), 2) - x)[:, 1]
    hits = ((gain[:, None] - cases).abs() < 1e-12).all(-1)
    assert (hits.sum(1) == 1).all() and (hits.double().mean(0) > 0.15).all()


@pytest.mark.parametrize("rates", [dict(attn_drop=0.1), dict(proj_drop=0.1)], ids=lambda r: next(iter(r)))
@pytest.mark.parametrize("kind", [DividedSTAttention, JointSTAttention], ids=["divided", "joint"])
def test_a_named_backend_without_dropout_refuses(kind, rates):
    module = kind(16, 2, backend="cpp", **rates)
    with pytest.raises(
        RuntimeError, match=r"backend 'cpp' cannot run: attn_drop = 0.*proj_drop = .*expected|probabilities"
    ):
        module(torch.randn(1, 5, 16), 2)
    module.backend = "reference"
    assert module(torch.randn(1, 5, 16), 2).shape == (1, 5, 16)
    if registry.get("cpp").why_not("cpu", torch.float32, 8) is None:
        module.backend = "cpp"
        assert module.eval()(torch.randn(1, 5, 16), 2).isfinite().all()


# --- no copies, bad input --------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


VIEWS = {"view", "_unsafe_view", "t", "unbind", "select", "slice", "detach", "expand", "alias"}
COMPUTE = {"add_layer_norm_fwd", "addmm", "linear", "attn_fwd"}


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("batch, folds", [(3, 0), (8, 1)], ids=["separate", "folded"])
def test_nothing_is_copied_between_input_and_output(cls, batch, folds):
    """Every operator of an inference step is on a list without a permute, a copy, a repeat or a concatenation."""
    module = DividedSTAttention(64, 2, class_token=cls, backend="cpp")
    if reason := registry.get("cpp").why_not("cpu", torch.float32, 32):
        pytest.skip(f"cpp: {reason}")
    with torch.no_grad(), Recorder() as recorder:
        module(torch.randn(batch, cls + 12, 64), 4)
    seen = [name for name in recorder.seen if name not in VIEWS]
    assert set(seen) <= COMPUTE | {"randn", "add_", "mm"}
    # Five products; folded, one joins the two weights (mm) and one of the five carries the bias alone.
    # The residual of the time step is added in the pass of the next LayerNorm, that of the space step on its own.
    counts = {"addmm": 5, "mm": folds, "attn_fwd": 2, "add_layer_norm_fwd": 2, "add_": 1}
    assert {name: seen.count(name) for name in counts} == counts


def test_no_copy_in_training():
    module = DividedSTAttention(64, 2, backend="cpp")
    if reason := registry.get("cpp").why_not("cpu", torch.float32, 32):
        pytest.skip(f"cpp: {reason}")
    x = torch.randn(2, 13, 64)
    with Recorder() as recorder:
        module(x, 4)
    assert {name for name in recorder.seen if name not in VIEWS} <= COMPUTE | {"add"}


@pytest.mark.parametrize(
    "x, frames, error, words",
    [
        pytest.param(torch.zeros(2, 10, 16), 4, ValueError, ["x", "10 tokens", "frames = 4", "class row"], id="count"),
        pytest.param(torch.zeros(2, 0, 16), 4, ValueError, ["x", "0 tokens"], id="no-class-row"),
        pytest.param(torch.zeros(9, 16), 4, ValueError, ["x", "(9, 16)", "(batch, tokens, 16)"], id="rank"),
        pytest.param(torch.zeros(2, 9, 8), 4, ValueError, ["x", "(2, 9, 8)", "(batch, tokens, 16)"], id="dim"),
        pytest.param(torch.zeros(2, 9, 16), 0, ValueError, ["frames", "0", "positive"], id="no-frames"),
        pytest.param(torch.zeros(2, 9, 16), 4.0, ValueError, ["frames", "4.0", "integer"], id="float-frames"),
        pytest.param([1.0], 4, TypeError, ["x", "list", "Tensor"], id="list"),
    ],
)
@pytest.mark.parametrize("kind", [DividedSTAttention, JointSTAttention], ids=["divided", "joint"])
def test_bad_input(kind, x, frames, error, words):
    with pytest.raises(error) as caught:
        kind(16, 2)(x, frames)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(num_heads=5), "num_heads"),
        (dict(attn_drop=1.0), "attn_drop"),
        (dict(proj_drop=-0.1), "proj_drop"),
        (dict(drop_path=1.0), "drop_path"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: got .*expected"):
        DividedSTAttention(16, **{"num_heads": 2, **options})


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'cudnn', expected one of auto"):
        DividedSTAttention(16, 2, backend="cudnn")(torch.zeros(1, 5, 16), 2)


def test_empty_batch(backend):
    x = torch.zeros(0, 9, 16, requires_grad=True)
    out = DividedSTAttention(16, 2, backend=backend)(x, 4)
    assert out.shape == (0, 9, 16)
    out.sum().backward()


def test_state_dict_names():
    names = {name.rsplit(".", 1)[0] for name in DividedSTAttention(16, 2).state_dict()}
    expected = "temporal_norm1 temporal_attn.qkv temporal_attn.proj temporal_fc norm1 attn.qkv attn.proj"
    assert names == set(expected.split())
