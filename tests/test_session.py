# SPDX-License-Identifier: Apache-2.0
"""Session: the model's own logits, for the shapes and the dtype that it holds, and errors that say which."""

import copy

import blocks
import pytest
import torch
from blocks import TINY, clip
from oracle import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from timesformer import TimeSformer, inference
from timesformer.inference import Session
from timesformer.inplace import InPlace

SHAPES = [(2, 3, 4, 32, 32), (1, 3, 3, 16, 24)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make(generator, dtype=torch.float32, device="cpu", **options):
    return blocks.randomise(TimeSformer(**{**TINY, **options}), generator).to(device, dtype).eval()


def videos(generator, dtype=torch.float32, device="cpu"):
    return [clip(generator, s[0], *s[2:], dtype).to(device) for s in SHAPES]


@pytest.mark.parametrize("kind", ["divided_space_time", "joint_space_time", "space_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_by_the_rule(generator, device, kind, dtype):
    model = make(generator, dtype, device, attention_type=kind)
    session = Session(model, SHAPES)
    assert session.dtype == dtype and session.not_folded is None and not model.fused
    p = {name: q.detach().cpu() for name, q in model.named_parameters()}
    for video in videos(generator, dtype, device) * 2:  # each shape twice, in turns
        exact, eager = (
            blocks.timesformer({n: q.to(d) for n, q in p.items()}, video.cpu().to(d), (4, 4), 4, kind)
            for d in (torch.float64, dtype)
        )
        got = session(video)
        assert not got.requires_grad
        assert_no_worse("logits", got.cpu(), exact, eager)


def test_results_do_not_share_memory(generator, device):
    session = Session(make(generator, device=device), SHAPES)
    first, second = clip(generator, dtype=torch.float32).to(device), clip(generator, dtype=torch.float32).to(device)
    kept = session(first)
    before = kept.clone()
    assert not torch.equal(session(second), before) and torch.equal(kept, before)
    assert torch.equal(session(first), before)


def test_another_dtype_than_the_models(generator, device):
    model = make(generator, device=device)
    session = Session(model, SHAPES, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    low = copy.deepcopy(model).bfloat16()
    for video in videos(generator, torch.bfloat16, device):
        with torch.no_grad():
            torch.testing.assert_close(session(video), low(video), rtol=0.05, atol=0.1)


class Products(TorchDispatchMode):
    """Dtypes of the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "linear"):
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("can", [True, False], ids=["native", "emulated"])
def test_bfloat16_products_where_the_cpu_cannot(generator, monkeypatch, can):
    """Then they run in float32, from the same weights: more exact, not less."""
    monkeypatch.setattr(inference, "native", lambda dtype: can or dtype == torch.float32)
    model = make(generator, torch.bfloat16)
    session = Session(model, SHAPES)
    compute = torch.bfloat16 if can else torch.float32
    assert session.compute_dtype == compute and session.dtype == torch.bfloat16
    video = clip(generator, dtype=torch.bfloat16)
    with Products() as products:
        got = session(video)
    assert products.seen == {compute} and got.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if not can:
        wide = copy.deepcopy(model).float()
        with torch.no_grad():
            torch.testing.assert_close(got, wide(video.float()).bfloat16(), rtol=0.01, atol=0.02)


def test_what_the_cpu_reports(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not inference.native(torch.bfloat16) and not inference.native(torch.float16)
    assert inference.native(torch.float32) and inference.native(torch.float64)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert inference.native(torch.bfloat16) and not inference.native(torch.float16)


@pytest.mark.parametrize(
    "video, words",
    [
        (torch.zeros(3, 3, 4, 32, 32), ["(3, 3, 4, 32, 32)"]),
        (torch.zeros(2, 3, 4, 32, 32, dtype=torch.float64), ["torch.float64"]),
        (torch.zeros(2, 3, 4, 32, 32, device="meta"), ["meta"]),
    ],
    ids=["shape", "dtype", "device"],
)
def test_what_it_does_not_hold(generator, video, words):
    session = Session(make(generator), SHAPES)
    with pytest.raises(ValueError) as caught:
        session(video)
    held = ["this session holds", *map(str, SHAPES), "torch.float32 on cpu"]
    assert all(word in str(caught.value) for word in [*words, *held]), caught.value
    assert session(clip(generator, dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["shared", "copied"])
def test_changed_weights_are_noticed(generator, dtype):
    model = make(generator)
    session = Session(model, SHAPES, dtype=dtype)
    with torch.no_grad():
        model.blocks[0].norm1.bias.add_(1)
    with pytest.raises(RuntimeError, match="weights have changed"):
        session(clip(generator, dtype=session.dtype))


def test_a_converted_model_is_noticed(generator):
    """Its parameters are the same objects, in other memory than that which a graph reads."""
    model = make(generator)
    session = Session(model, SHAPES)
    model.double().float()
    with pytest.raises(RuntimeError, match="weights have changed"):
        session(clip(generator, dtype=torch.float32))


def test_a_model_that_cannot_be_folded_runs_as_it_is(generator):
    model, seen = make(generator), []
    model.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    session = Session(model, SHAPES[:1])
    video = clip(generator, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(session(video), model(video))
    assert "blocks.1.mlp" in session.not_folded and len(seen) == 3


def test_out_of_memory_is_torchs_own_error(generator, monkeypatch):
    """While a session is made and in a call: model and session go on."""
    model, video = make(generator), clip(generator, dtype=torch.float32)
    session = Session(model, SHAPES)
    exact, mlp = session(video), type(model.blocks[0].mlp)

    def full(*_):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", full)
        patch.setattr(InPlace, "_mlp", full)
        for call in (lambda: session(video), lambda: Session(model, SHAPES)):
            with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
                call()
    assert torch.equal(session(video), exact)
    with torch.no_grad():
        torch.testing.assert_close(model(video), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(model=torch.nn.Linear(1, 1)), TypeError, "model: got Linear"),
        (dict(model=TimeSformer(**TINY)), ValueError, "model: got one in training mode"),
        (dict(shapes=[]), ValueError, "shapes: got none"),
        (dict(shapes=[(3, 4, 32, 32)]), ValueError, r"shapes: got \(3, 4, 32, 32\), expected five"),
        (dict(shapes=["12345"]), TypeError, "shapes: got an element '12345'"),
        (dict(shapes=[(1, 3, 4, 30, 32)]), ValueError, "height a multiple of 8"),
        (dict(dtype=torch.int8), ValueError, "dtype: got torch.int8"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(generator, change, error, words):
    arguments = {"model": make(generator), "shapes": SHAPES, "dtype": None, **change}
    with pytest.raises(error, match=words):
        Session(arguments["model"], arguments["shapes"], dtype=arguments["dtype"])
