# SPDX-License-Identifier: Apache-2.0
"""The way from a call to a GPU, without one: Triton's own run-time compiler under a driver that only takes notes.

The interpreter of the other tests never comes here. So this file runs itself in a fresh process, where a stand-in for
Triton's driver says that there is an sm_90, takes CPU tensors, and records what would be launched: kernels are really
compiled. Each `check_` below is one test.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

CHECKS = {}
CHILD_SECONDS = 500


def check(function):
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


# --- the child: a driver that takes notes ----------------------------------------------------------------------------


def identity(x):
    return (x.data_ptr(), x.dtype) if isinstance(x, torch.Tensor) else x


class Launched(NamedTuple):
    """What the driver was asked to start."""

    kernel: str
    names: tuple  # of the parameters
    grid: tuple
    stream: int
    function: int  # one for each binary
    metadata: tuple
    hooks: tuple
    args: tuple

    @property
    def named(self):
        return dict(zip(self.names, self.args, strict=True))

    def same(self, other):
        """Whether both would run the same code on the same data."""
        a, b = (x._replace(args=tuple(map(identity, x.args)), hooks=()) for x in (self, other))
        return a == b


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), hash(kernel), 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}


class Driver:
    """Triton's driver for one sm_90 whose current stream is `stream`."""

    def __init__(self, target):
        self.target, self.utils, self.stream, self.launched, self.compiled = target, Utils(), 7, [], 0

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        assert device == 0
        return self.stream

    def launcher_cls(self, src, metadata):
        def start(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            if getattr(enter, "calls", None):
                enter(launch_metadata)
            call = Launched(
                src.fn.__name__, tuple(src.fn.arg_names), (x, y, z), stream, function, metadata, (enter, leave), args
            )
            self.launched.append(call)

        return start

    def count(self, **_):
        self.compiled += 1

    def during(self, call, *args):
        """(what was launched, kernels compiled) by call(*args)."""
        del self.launched[:]
        before = self.compiled
        self.result = call(*args)
        return list(self.launched), self.compiled - before


def arguments(scheme, cls, B=2, H=3, T=4, N=5, shift=0, dtype=torch.bfloat16):
    """q, k, v, the view and the scale of a call; `shift` elements move the tensors off their alignment."""
    from timesformer_kernels import grid

    tokens, D = N * T + (cls != "none"), 64
    packed = torch.zeros(B * tokens * 3 * H * D + shift, dtype=dtype)[shift:].view(B, tokens, 3, H, D)
    return *packed.unbind(2), grid.view_of_frames(scheme, tokens, T, cls, "space_major"), 0.125, None


def forward(*args):
    from timesformer_kernels.backends.triton import attention

    return attention.forward(*args)


def tritons_own(step, like, tensors, *floats):
    """Step.run by the plain way."""
    step.kernel[(step.programs,)](*tensors, *step.numbers, *floats, step.plan, **step.options)


# --- the checks ------------------------------------------------------------------------------------------------------


@check
def check_arguments_arrive_in_order(driver):
    from timesformer_kernels.backends.triton import regimes

    B, H, T, N, D = 2, 3, 4, 5, 64
    args = arguments("time", "exclude", B, H, T, N)
    for _ in range(2):  # the first call compiles, the second goes straight to the launcher
        (call,), _ = driver.during(forward, *args)
        got = call.named
        assert call.kernel == "resident_forward"
        assert all(got[f"{x}_ptr"] is tensor for x, tensor in zip("qkv", args, strict=False))
        assert got["o_ptr"] is driver.result
        assert got["cls_ptr"] is got["top_ptr"] is got["sums_ptr"] is None
        plan = got["P"]
        assert (plan.VEC, plan.D, plan.M, plan.CLS) == (8, D, T, 0)
        for x in "qkv":  # in units of 16 bytes
            assert [got[x + axis] for axis in "bsh"] == [(N * T + 1) * 3 * H * D // 8, 3 * H * D // 8, D // 8]
        tiles = -(-N // plan.PACK)
        assert [got[name] for name in ("tokens", "heads", "groups", "tiles")] == [N * T + 1, H, N, tiles]
        assert (got["gs0"], got["ls0"], got["scale"]) == (T, 1, 0.125)
        assert call.grid == (B * tiles * H, 1, 1)
        assert call.metadata[0] == regimes.config("resident_forward", "sm_8x", "ieee", 2, D, T).num_warps


@check
def check_same_as_tritons_own_way(driver):
    """Every launch of forward and backward, first and later calls, is what kernel[grid](...) would have started."""
    from timesformer_kernels.backends.triton import attention, regimes
    from timesformer_kernels.backends.triton.launch import Step

    def call(memory, q, k, v, view, scale, stats, out):
        """Both directions, with results where they lay before."""
        at = iter(range(100))

        def empty(x, shape, dtype=None):
            return memory.setdefault(next(at), torch.zeros(shape, dtype=dtype or x.dtype))

        def like(x, **_):
            return empty(x, x.shape)

        with mock.patch.object(torch.Tensor, "new_empty", empty), mock.patch.object(torch, "empty_like", like):
            attention.forward(q, k, v, view, scale, None, stats)
            attention.backward(out, q, k, v, view, scale, None, None, (out, stats))

    cases = (
        ("time", "exclude", torch.bfloat16),
        ("space", "per_group", torch.bfloat16),
        ("space", "global", torch.float16),
    )
    for (scheme, cls, dtype), shift in itertools.product(cases, (0, 1)):
        q, k, v, view, scale, _ = arguments(scheme, cls, shift=shift, dtype=dtype)
        size = regimes.stats_size(q.shape, dtype, view)
        stats = torch.zeros(size + shift)[shift:] if size else None
        args = {}, q, k, v, view, scale, stats, torch.zeros(q.shape, dtype=dtype)
        first, _ = driver.during(call, *args)
        later, compiled = driver.during(call, *args)
        with mock.patch.object(Step, "run", tritons_own):
            plain, also = driver.during(call, *args)
        assert compiled == also == 0
        assert len(plain) == (2 if cls == "exclude" else 4)
        for calls in (first, later):
            assert all(a.same(b) for a, b in zip(calls, plain, strict=True)), (scheme, cls, shift)


def steps_of_a_block(D=64, dtype=torch.bfloat16, shift=0, vectors=torch.float32):
    """[every fused step of the Triton backend, forward and backward, called with the same memory each time]"""
    from timesformer_kernels.backends.triton import fused

    x, branch, dsum, dout = (torch.zeros(2 * 9 * D + shift, dtype=dtype)[shift:].view(2, 9, D) for _ in range(4))
    weight, bias, scale = torch.zeros(D, dtype=vectors), torch.zeros(D, dtype=vectors), torch.ones(2, 9)
    return [
        lambda: fused.add_layer_norm_fwd(x, None, weight, bias, None, 1e-6, False),
        lambda: fused.add_layer_norm_fwd(x, branch, weight, bias, scale, 1e-6, False),
        lambda: fused.add_layer_norm_fwd(x, branch, weight, bias, None, 1e-5, True),
        lambda: fused.add_layer_norm_bwd(None, dout, x, weight, None, 1e-6, False, None),
        lambda: fused.add_layer_norm_bwd(dsum, dout, x, weight, scale[:, 0], 1e-6, True, dtype),
        lambda: fused.bias_gelu_fwd(x, bias),
        lambda: fused.bias_gelu_bwd(dout, x, bias),
    ]


def with_memory(memory, call):
    """call(), whose results lie where they lay before."""
    at = iter(range(100))

    def empty(x, *shape, dtype=None, **_):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape or x.shape
        return memory.setdefault(next(at), torch.zeros(shape, dtype=dtype or x.dtype))

    with mock.patch.object(torch.Tensor, "new_empty", empty), mock.patch.object(torch, "empty_like", empty):
        return call()


@check
def check_fused_steps_are_the_same_as_tritons_own_way(driver):
    """First and later calls; another shape, dtype, alignment or option in between never meets a wrong binary."""
    from timesformer_kernels.backends.triton import launch

    def own(kernel, programs, args, options):
        return kernel[(programs,)](*args, **options)

    kinds = (dict(), dict(dtype=torch.float32), dict(shift=1), dict(D=80), dict(vectors=torch.bfloat16))
    calls = [(step, {}) for kind in kinds for step in steps_of_a_block(**kind)]
    seen = [[], []]
    for later in range(2):
        for step, memory in calls:
            launched, compiled = driver.during(with_memory, memory, step)
            assert not (later and compiled)
            seen[later].append(launched)
    with mock.patch.object(launch, "_start", own):
        plain = [driver.during(with_memory, memory, step)[0] for step, memory in calls]
    for launches in zip(*seen, plain, strict=True):
        for first, later, exact in zip(*launches, strict=True):
            assert first.same(exact) and later.same(exact), exact.kernel
    assert len({x.function for launches in plain for x in launches}) >= 12


@check
def check_later_fused_steps_go_past_tritons_binder(driver):
    from timesformer_kernels.backends.triton import fused_kernels, launch

    steps = steps_of_a_block()
    for step in steps:
        driver.during(step)
    names = [name for name in vars(fused_kernels) if name.endswith("_kernel")]
    run = type(fused_kernels.bias_gelu_fwd_kernel).run
    with contextlib.ExitStack() as patches:
        binder = patches.enter_context(
            mock.patch.object(type(fused_kernels.bias_gelu_fwd_kernel), "run", side_effect=run)
        )
        assert all(len(driver.during(step)[0]) >= 1 for step in steps) and len(names) == 5
        assert binder.call_count == 0
    with mock.patch.object(launch, "MAX_BINARIES", 0):
        launch._BINARIES.clear()
        assert all(driver.during(step)[1] == 0 for step in steps for _ in range(2)) and len(launch._BINARIES) == 1


@check
def check_stream_is_asked_for_at_every_call(driver):
    args = arguments("time", "exclude")
    seen = []
    for driver.stream in (7, 9, 11, 7):
        calls, _ = driver.during(forward, *args)
        seen += [call.stream for call in calls]
    assert seen == [7, 9, 11, 7]


@check
def check_nothing_is_compiled_for_other_sizes(driver):
    driver.during(forward, *arguments("time", "exclude"))
    for sizes in (dict(B=1), dict(B=16), dict(H=1), dict(H=16), dict(N=2), dict(N=49), dict(B=1, H=1, N=2)):
        calls, compiled = driver.during(forward, *arguments("time", "exclude", **sizes))
        assert (len(calls), compiled) == (1, 0), sizes
    q, k, v, *rest = arguments("time", "exclude")
    apart = [torch.zeros(2, 21, 3, 64, dtype=torch.bfloat16) for _ in range(3)]  # other strides
    assert driver.during(forward, *apart, *rest)[1] == 0
    far = [x[:1].as_strided((1, *x.shape[1:]), (2**40, *x.stride()[1:])) for x in (q, k, v)]
    calls, compiled = driver.during(forward, *far, *rest)
    assert calls[0].named["qb"] == 2**40 // 8 and compiled == 1  # 64-bit numbers are another type
    assert driver.during(forward, *far, *rest)[1] == 0


@check
def check_an_integer_scale_is_a_number_like_others(driver):
    q, k, v, view, _, weights = arguments("time", "exclude")
    driver.during(forward, q, k, v, view, 0.125, weights)
    for scale in (1, 2, 16):  # to triton 1 is a constant, 16 a multiple of 16
        (call,), compiled = driver.during(forward, q, k, v, view, scale, weights)
        assert compiled == 0 and call.named["scale"] == scale and type(call.named["scale"]) is float


@check
def check_misaligned_tensors_take_the_narrow_path(driver):
    (wide,), _ = driver.during(forward, *arguments("time", "exclude"))
    for shift in (1, 4):  # 2 and 8 bytes
        (narrow,), _ = driver.during(forward, *arguments("time", "exclude", shift=shift))
        assert narrow.named["P"].VEC == 1 and narrow.named["qs"] == 8 * wide.named["qs"]
        assert narrow.function != wide.function
    (again,), compiled = driver.during(forward, *arguments("time", "exclude"))
    assert again.function == wide.function and compiled == 0


@check
def check_a_binary_serves_only_what_it_was_compiled_for(driver):
    """The same step with other alignments, types or tensors left out asks triton again."""
    from timesformer_kernels.backends.triton import attention

    layout = None

    def remember(self, *args, keep=attention.Step.run):
        nonlocal layout
        layout = self
        return keep(self, *args)

    with mock.patch.object(attention.Step, "run", remember):
        (base,), _ = driver.during(forward, *arguments("time", "exclude"))
    tensors, functions = base.args[:7], {base.function}
    shifted = torch.zeros(tensors[3].numel() + 1, dtype=torch.bfloat16)[1:].view(tensors[3].shape)
    for change in ((3, shifted), (3, tensors[3].float()), (6, torch.zeros(8)), (6, torch.zeros(9)[1:])):
        changed = (*tensors[: change[0]], change[1], *tensors[change[0] + 1 :])
        (first,), compiled = driver.during(layout.run, tensors[0], changed, 0.125)
        (later,), none = driver.during(layout.run, tensors[0], changed, 0.125)
        assert (compiled, none) == (1, 0) and first.same(later)
        functions.add(first.function)
    assert len(functions) >= 3  # a pointer that the kernel does not read makes no other code
    (same,), _ = driver.during(layout.run, tensors[0], tensors, 0.125)
    assert same.function == base.function


@check
def check_nothing_is_started_for_an_empty_batch(driver):
    q, k, v, *rest = arguments("time", "exclude")
    assert driver.during(forward, q[:0], k[:0], v[:0], *rest) == ([], 0)
    from timesformer_kernels.backends.triton.launch import launch

    launch(None, 0, q, (), {})  # None would fail


@check
def check_more_programs_than_a_grid_takes_are_refused(driver):
    from timesformer_kernels.backends.triton.launch import MAX_GRID, Step, launch

    q = arguments("time", "exclude")[0]
    assert MAX_GRID == 2**31 - 1
    for start in (lambda: launch(None, 2**31, q, (), {}), lambda: Step(None, 2**31, (), None, {}).run(q, ())):
        with pytest.raises(RuntimeError, match="2147483648 blocks of work are more than a GPU takes"):
            driver.during(start)
    assert not driver.launched


@check
def check_the_device_of_the_tensors_is_made_current(driver):
    from timesformer_kernels.backends.triton.launch import Step, launch

    entered, inside = [], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append("left")

    class Kernel:
        pre_run_hooks = ()

        def __getitem__(self, grid):
            return lambda *args, **options: inside.append((grid, list(entered), args, options))

    like = mock.Mock(get_device=lambda: 1)
    for current, expected in ((0, [1]), (1, [])):
        for start in (
            lambda: launch(Kernel(), 6, like, (1, "plan"), {"num_warps": 2}),
            lambda: Step(Kernel(), 6, (1,), "plan", {"num_warps": 2}).run(like, ()),
        ):
            entered.clear(), inside.clear()
            with mock.patch("torch.cuda.current_device", lambda: current), mock.patch("torch.cuda.device", device):  # noqa: B023
                start()
            assert inside == [((6,), expected, (1, "plan"), {"num_warps": 2})]
            assert entered == expected + ["left"] * bool(expected)


@check
def check_profilers_are_told(driver):
    import triton

    args, seen = arguments("time", "exclude"), []
    (quiet,), _ = driver.during(forward, *args)
    (quiet,), _ = driver.during(forward, *args)
    assert quiet.hooks == (None, None)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        driver.during(forward, *args)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["resident_forward"]
    assert driver.during(forward, *args)[0][0].hooks == (None, None)


@check
def check_other_code_is_made_where_it_is_asked_for(driver):
    """debug is an option of the compiler that is set from outside."""
    import triton

    args = arguments("time", "exclude")
    driver.during(forward, *args)
    with mock.patch.object(triton.knobs.runtime, "debug", True):
        assert driver.during(forward, *args)[1] == 1
    assert driver.during(forward, *args)[1] == 0


@check
def check_the_same_call_is_the_same_launch(driver):
    """Nothing is measured, tuned or counted between calls."""
    q, k, v, view, scale, weights = arguments("space", "per_group")
    calls = [driver.during(forward, q, k, v, view, scale, weights)[0] for _ in range(4)]
    for later in calls[1:]:
        for a, b in zip(calls[0], later, strict=True):
            assert (a.kernel, a.grid, a.function, a.metadata) == (b.kernel, b.grid, b.function, b.metadata)
            assert [x.shape if isinstance(x, torch.Tensor) else x for x in a.args] == [
                x.shape if isinstance(x, torch.Tensor) else x for x in b.args
            ]


@check
def check_warming_up_counts_what_it_compiles(driver):
    from timesformer_kernels.warmup import warmup

    class Model(torch.nn.Linear):
        def forward(self, x):
            q, k, v, *rest = arguments("height", "none", N=x.shape[1])  # a view that no other check has
            return forward(q, k, v, *rest)

    before = driver.compiled
    assert warmup(Model(1, 1), [(1, 2), (1, 2), (1, 3)]) == driver.compiled - before > 0
    assert warmup(Model(1, 1), [(1, 2), (1, 3)]) == 0


def child():
    import triton
    from triton.backends.compiler import GPUTarget

    torch.set_num_threads(1)
    driver, results = Driver(GPUTarget("cuda", 90, 32)), {}
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.jit_post_compile_hook = driver.count
    for name, function in CHECKS.items():
        try:
            function(driver)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps({"triton": triton.__version__, "compiled": driver.compiled, "results": results}))


# --- the parent ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the child found: for every check None, or the traceback."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env.update(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve()], env=env, capture_output=True, text=True, timeout=CHILD_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_launch(report, name):
    assert report["results"][name] is None, report["results"][name]


def test_kernels_were_really_compiled(report):
    assert report["compiled"] >= 10


if __name__ == "__main__":
    child()
