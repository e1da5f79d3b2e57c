# SPDX-License-Identifier: Apache-2.0
"""Which GPU backend `auto` takes: the rules, the table of the package, and calls that follow it on every way.

The rules speak of GPUs. Here the CPU passes for one, and copies of the reference for the backends they choose between.
"""

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import make_qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from timesformer_kernels import choice, explain, grid, grid_attention, registry, space_attention, time_attention
from timesformer_kernels.backends import reference
from timesformer_kernels.choice import Rule

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "choose_backend.py"
WHY = {"expected": "so we think"}
BITS16 = ("bfloat16", "float16")
NUMBERS = {"device": "A GPU", "date": "2031-02-03", "file": "a.json", "ms": {"g": {"triton": 3.0, "cuda": 2.0}}}


def rule(backend, members=(0, None), architecture="any", dtypes=("float32",), head_dim=(1, None), reason=WHY):
    return Rule(architecture, dtypes, head_dim, members, backend, reason)


def view(members):
    return grid.view("time", (1, 2, members), "none")


@pytest.fixture
def world(monkeypatch):
    """world(*rules, unable={name: reason}) makes the CPU a GPU of architecture sm_90 with backends "triton" and "cuda";
    the list of (step, backend) that ran."""
    ran = []

    def spy(name):
        def forward(q, k, v, view, scale, cls_weights, stats=None):
            ran.append(("forward", name))
            if stats is not None:
                stats.fill_(1 if name == "cuda" else 2)
            return reference.forward(q, k, v, view, scale, cls_weights)

        def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
            ran.append(("backward", name))
            assert (saved[1] == (1 if name == "cuda" else 2)).all()
            return reference.backward(dout, q, k, v, view, scale, cls_weights, grads)

        return forward, backward

    def go(*rules, unable=()):
        unable = dict(unable)
        for name, size in (("triton", 3), ("cuda", 5)):
            able = lambda device, dtype, head_dim, name=name: unable.get(name)  # noqa: E731
            sizes = lambda shape, dtype, view, size=size: size * shape[0]  # noqa: E731
            made = registry.Backend(name, *spy(name), able, sizes)
            monkeypatch.setitem(registry._BACKENDS, name, made)
        monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(choice, "rules", lambda: rules)
        registry.resolve.cache_clear()
        return ran

    yield go
    monkeypatch.undo()
    registry.resolve.cache_clear()


def takes(members, dtype=torch.float32, head_dim=8, name="auto"):
    return registry.resolve(name, "cpu", dtype, head_dim, view(members)).name


# --- the rules -------------------------------------------------------------------------------------------------------


def test_spans_are_the_first_rule_that_fits():
    """Of rules that overlap in any way, for every length."""
    draw = random.Random(0)
    for _ in range(200):
        rules = []
        for _ in range(draw.randrange(5)):
            first = draw.choice([0, 1, 5, 16, 17, 40])
            rules.append(rule(draw.choice("ab"), (first, draw.choice([None, first, first + 3, first + 20]))))
        spans = choice.spans(rules)
        assert spans[-1][0] is None and all(a[0] < b[0] for a, b in itertools.pairwise(spans[:-1]))
        for members in range(70):
            wanted = [r for r in rules if r.members[0] <= members and r.members[1] in (None, *range(members, 99))]
            got = next(found for most, found in spans if most is None or members <= most)
            assert got is (wanted[0] if wanted else None), (rules, members)


def test_a_rule_speaks_of_what_it_names(world):
    world(
        rule("triton", (4, 9), "sm_80", BITS16, (32, 64)),
        rule("cuda", (4, 9), "sm_90", BITS16, (32, 64)),
        rule("triton", dtypes=(*BITS16, "float32")),
    )
    half = torch.float16
    assert [takes(m, half, 64) for m in (0, 1, 3, 4, 9, 10, 1000)] == ["triton"] * 3 + ["cuda"] * 2 + ["triton"] * 2
    assert [takes(4, half, d) for d in (31, 32, 64, 65)] == ["triton", "cuda", "cuda", "triton"]
    assert takes(4, torch.bfloat16, 32) == "cuda" and takes(4, torch.float32, 32) == "triton"


def test_the_class_row_is_a_member_where_it_takes_part(world):
    world(rule("cuda", (0, 4)), rule("triton"))
    taken = {
        cls: registry.resolve("auto", "cpu", torch.float32, 8, grid.view("time", (1, 1, 4), cls)).name
        for cls in grid.CLS_MODES
    }
    assert taken == {"none": "cuda", "exclude": "cuda", "per_group": "triton", "key": "triton", "global": "triton"}


def test_without_a_rule_the_first_that_can(world):
    world(rule("cuda", (5, 9)))
    assert [takes(m) for m in (4, 5, 10)] == ["triton", "cuda", "triton"]
    world(rule("cuda", (5, 9)), unable={"triton": "no compiler"})
    assert [takes(m) for m in (4, 5, 10)] == ["cuda", "cuda", "cuda"]


def test_where_the_choice_cannot_run_the_next_serves_and_explain_says_both(world):
    world(rule("cuda", (0, 8)), rule("triton"), unable={"cuda": "it was never built"})
    assert takes(4) == takes(9) == "triton"
    q = torch.zeros(1, 1 + 2 * 4, 1, 8)
    line = explain(q, q, q, scheme="time", frames=4).splitlines()[-1]
    assert line.startswith(
        "      auto: takes triton for sequences of 4 members, the first that can run; the rule is cuda"
    )
    assert "expected, not measured: so we think" in line and line.endswith("it cannot run: it was never built")
    world(rule("cuda"), unable={"cuda": "never built", "triton": "not installed"})
    assert takes(4) == next(n for n in ("cpp", "reference") if registry.get(n).why_not("cpu", torch.float32, 8) is None)


def test_a_named_backend_never_falls_back(world):
    world(rule("cuda"), unable={"triton": "it is Sunday"})
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it is Sunday"):
        takes(4, name="triton")
    world(rule("cuda"))
    assert takes(4, name="triton") == "triton"
    q = make_qkv(1, 9, 1, 8)
    time_attention(*q, frames=4, backend="triton")
    assert world(rule("cuda"))[-1] == ("forward", "triton")


def test_nothing_is_chosen_between_for_a_cpu(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: pytest.fail("read for a CPU"))
    registry.resolve.cache_clear()
    assert takes(4) in ("cpp", "reference")
    assert choice.architecture(torch.device("cpu")) is None and choice.architecture(torch.device("meta")) is None


def test_the_architecture_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (12, 0))
    asked = choice.architecture.__wrapped__
    assert [asked(torch.device("cuda", i)) for i in range(3)] == ["sm_120", "sm_90", "other"]  # the third is a fake's
    assert asked(torch.device("cuda")) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert asked(torch.device("cuda", 0)) == "other"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asked(torch.device("cuda", 0)) == "other"


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eager", "transform", "op", "compiled"])
def test_forward_and_backward_are_one_backends(world, way):
    """Their statistics have other sizes and values in each."""
    ran = world(rule("cuda", (0, 6)), rule("triton"))

    def loss(q, k, v, frames):
        return time_attention(q, k, v, frames=frames, cls="exclude").square().sum()

    if way == "compiled":
        torch._dynamo.reset()
        call = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for frames, expected in ((4, "cuda"), (6, "cuda"), (7, "triton"), (12, "triton"), (5, "cuda")):
        q, k, v = (x.requires_grad_() for x in make_qkv(2, 1 + 3 * frames, 2, 8))
        ran.clear()
        if way == "transform":
            got = torch.func.grad(lambda q, k=k, v=v, f=frames: loss(q, k, v, f))(q)
        elif way == "op":
            flat = grid.view("time", (3, 1, frames), "exclude").flat()
            out = torch.ops.timesformer_kernels.attn_fwd(q, k, v, *flat, "exclude", 8**-0.5, "auto", None)[0]
            (got,) = torch.autograd.grad(out.square().sum(), q)
        else:
            (got,) = torch.autograd.grad((call if way == "compiled" else loss)(q, k, v, frames), q)
        assert ran == [("forward", expected), ("backward", expected)]
        plain = time_attention(q, k, v, frames=frames, backend="reference").square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(plain, q)[0])


def test_space_and_time_of_one_clip_may_differ(world):
    ran = world(rule("cuda", (0, 8)), rule("triton"))
    q = make_qkv(1, 1 + 9 * 4, 1, 8)
    time_attention(*q, frames=4)
    space_attention(*q, frames=4)
    grid_attention(*q, grid=(3, 3, 4), scheme="height", cls="key")
    assert [name for _, name in ran] == ["cuda", "triton", "cuda"]


def symbolic(rules, world):
    """The guards of a fake call of 6 frames whose number is a symbol."""
    world(*rules)
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = ShapeEnv()
    frames = env.create_symintnode(
        env.create_symbol(6, ConstantSource("frames"), dynamic_dim=DimDynamic.DYNAMIC), hint=6
    )
    with FakeTensorMode(shape_env=env):
        q = torch.empty(2, 1 + 3 * frames, 2, 8)
        before = len(env.guards)
        flat = [3, frames], [frames, 1]
        _, stats = torch.ops.timesformer_kernels.attn_fwd(q, q, q, *flat, "exclude", 1.0, "auto", None)
    return [str(guard.expr) for guard in env.guards[before:]], int(stats.shape[0])


def test_a_symbolic_length_is_compared_only_where_it_decides(world):
    guards, size = symbolic([rule("cuda", (0, 16)), rule("triton")], world)
    assert size == 10 and any("<= 16" in guard for guard in guards) and not any("Eq" in guard for guard in guards)
    guards, size = symbolic([rule("cuda", (0, 4)), rule("triton", (5, 16)), rule("cuda")], world)
    assert size == 6 and any("<= 16" in guard for guard in guards)
    guards, size = symbolic([rule("triton", (0, 16)), rule("triton")], world)
    assert size == 6 and not guards
    guards, size = symbolic([rule("cuda", (0, 16), dtypes=BITS16), rule("triton")], world)
    assert size == 6 and not guards


def test_fake_tensors_of_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with FakeTensorMode():
        q = torch.empty(2, 9, 2, 64, device="cuda", dtype=torch.bfloat16)
        out = time_attention(q, q, q, frames=4)
    assert out.device.type == "cuda" and out.shape == q.shape
    assert "auto: takes reference" in explain(q, q, q, scheme="time", frames=4)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_explain_gives_the_rule_and_its_reason(world):
    numbers = {"measured": {**NUMBERS, "ratio": 1.5, "noise": 0.02}}
    world(rule("cuda", (0, 8), reason=numbers), rule("triton", (9, 20)), unable={})
    q = torch.zeros(1, 1 + 9 * 4, 1, 8)

    def auto(**options):
        lines = explain(q, q, q, **options).splitlines()
        assert [line.split(":")[0].strip() for line in lines[:4]] == list(registry.available_backends())
        return [line.removeprefix("      auto: ") for line in lines[4:]]

    measured = "measured: 1.50 times as fast as triton (1 table of a.json, A GPU, 2031-02-03)"
    assert auto(scheme="time", frames=4) == [f"takes cuda for sequences of 4 members; {measured}"]
    assert auto(scheme="time", grid=(3, 3, 4), cls="key") == [f"takes cuda for sequences of 5 members; {measured}"]
    expected = "expected, not measured: so we think"
    assert auto(scheme="space", frames=4) == [f"takes triton for sequences of 10 members; {expected}"]
    assert auto(scheme="joint", grid=(3, 3, 4)) == ["takes triton, the first that can run"]
    assert auto() == [
        f"takes cuda for sequences of 0 to 8 members; {measured}",
        f"takes triton for sequences of 9 to 20 members; {expected}",
        "takes triton, the first that can run",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scheme="time"), "frames, grid: got None and None"),
        (dict(scheme="time", frames=4, grid=(3, 3, 4)), "frames, grid: got 4 and"),
        (dict(scheme="joint", frames=4), "grid: missing"),
        (dict(frames=4), "scheme: missing"),
        (dict(scheme="time", frames=5), "expected a multiple of frames = 5"),
        (dict(scheme="space", grid=(3, 3, 5)), "expected 46 = 3 x 3 x 5"),
        (dict(scheme="depth", grid=(3, 3, 4)), "scheme: got 'depth'"),
        (dict(scheme="time", frames=4, cls="mean"), "cls: got 'mean'"),
    ],
)
def test_explain_checks_what_it_is_asked(options, message):
    q = torch.zeros(1, 1 + 9 * 4, 1, 8)
    with pytest.raises(ValueError, match=message):
        explain(q, q, q, **options)


def test_a_tie_is_said():
    numbers = {"measured": {**NUMBERS, "ratio": 0.99, "noise": 0.02}}
    assert "0.99 times as fast as triton, within the noise of 2.0% (" in choice.why(rule("cuda", reason=numbers))
    assert choice.tie(1.0199, 0.02) and choice.tie(1 / 1.0199, 0.02)
    assert not choice.tie(1.021, 0.02) and not choice.tie(1 / 1.021, 0.02)


# --- the table of the package ----------------------------------------------------------------------------------------


def test_the_table_speaks_of_every_call_that_a_gpu_backend_serves():
    rules = choice.read(choice.TABLE)
    assert {rule.backend for rule in rules} <= {"triton", "cuda"}
    for dtype, head_dim in itertools.product((torch.float32, *(getattr(torch, n) for n in BITS16)), range(1, 257)):
        for most, found in choice.spans(choice.fitting(rules, "sm_90", dtype, head_dim)):
            assert found is not None, (dtype, head_dim, most)
            assert head_dim <= 128 or found.backend == "cuda"  # triton has no kernel
    assert choice.fitting(rules, "sm_90", torch.float64, 64) == []


def test_no_rule_is_hidden_by_those_before_it():
    rules = choice.read(choice.TABLE)
    met = set()
    for arch in {"other", *(rule.architecture for rule in rules)}:
        for dtype, head_dim in itertools.product(("float32", *BITS16), range(1, 257)):
            fitting = choice.fitting(rules, arch, getattr(torch, dtype), head_dim)
            met |= {id(found) for _, found in choice.spans(fitting)}
    assert met == {id(rule) for rule in rules}


def test_the_table_is_as_the_script_writes_it():
    assert choice.TABLE.read_text() == script().render(choice.read(choice.TABLE))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"members": [5, 4]}, "members: got .5, 4."),
        ({"head_dim": [None, 4]}, "head_dim: got"),
        ({"dtypes": ["half a byte"]}, "'half a byte'"),
        ({"reason": {"felt": "so"}}, "reason: got"),
        ({"reason": {}}, "reason: got"),
        ({"reason": {"measured": {"device": "A GPU"}}}, "reason: got"),
        ({"direction": "forward"}, "direction, expected|got .*direction"),
    ],
)
def test_what_is_no_rule(tmp_path, changes, message):
    good = {**rule("cuda")._asdict(), "members": [0, None]}
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"rules": [good]}))
    assert choice.read(path) == (rule("cuda"),)
    path.write_text(json.dumps({"rules": [good, {**good, **changes}]}))
    with pytest.raises(ValueError, match=f"choice.json: rule 1: .*({message})"):
        choice.read(path)


# --- scripts/choose_backend.py ---------------------------------------------------------------------------------------


def script():
    if "choose_backend" not in sys.modules:
        spec = importlib.util.spec_from_file_location("choose_backend", SCRIPT)
        sys.modules["choose_backend"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["choose_backend"])
    return sys.modules["choose_backend"]


def bench(row, ms, scheme="time", frames=8, direction="forward", graph=None, noise=0.01, **changes):
    """A row as timesformer.benchmarking.record writes it."""
    info = {
        "row": row, "device": "cuda", "chip": "A GPU", "capability": "9.0", "kind": "attention",
        "op": f"{scheme} attention", "shape": f"{frames}x224: B=8, N=196, T={frames}, 12 heads of 64",
        "dtype": "bfloat16", "direction": direction, "frames": frames, "locations": 196, "batch": 8,
        "interleaved_median_ms": ms, "noise": noise, **changes,
    }  # fmt: skip
    if graph is not None:
        info |= {"graph_median_ms": graph, "graph_noise": noise}
    group = f"{scheme}-attention {info['shape'].split(',')[0]} {info['dtype']} {direction}"
    return {"name": f"{group} {row}", "group": group, "stats": {"median": 1.0}, "extra_info": info}


def expected_rules():
    """Of the package's rules those that no measurement has made."""
    return tuple(rule for rule in choice.read(choice.TABLE) if "expected" in rule.reason)


@pytest.fixture
def choose(tmp_path):
    """choose([benches of a file], ...) -> the rules that the script makes of expected_rules(), or of those it made."""
    out, unmeasured = tmp_path / "choice.json", tmp_path / "expected.json"
    unmeasured.write_text(script().render(expected_rules()))

    def go(*files, table=unmeasured):
        for i, benches in enumerate(files):
            result = {"machine_info": {}, "datetime": "2031-02-03T04:05:06+00:00", "benchmarks": benches}
            (tmp_path / f"{i}.result").write_text(json.dumps(result))
        paths = [str(tmp_path / f"{i}.result") for i in range(len(files))]
        assert script().main([*paths, "--table", str(table), "--out", str(out)]) == 0
        assert out.read_text() == script().render(choice.read(out))
        return choice.read(out)

    go.out = out
    return go


def both(cuda, triton, **options):
    return [bench("cuda", cuda, **options), bench("triton", triton, **options), bench("sdpa", 9.0, **options)]


def test_the_faster_one_gets_a_rule_with_its_numbers(choose):
    before = expected_rules()
    benches = both(2.0, 3.0) + both(2.0, 8.0, direction="forward+backward") + both(5.0, 4.0, scheme="space")
    rules = choose(benches)
    assert rules[2:] == before
    short, frame = rules[:2]
    assert short[:5] == ("sm_90", ("bfloat16",), (64, 64), (0, 16), "cuda")
    facts = short.reason["measured"]
    assert facts["ratio"] == pytest.approx(6**0.5, abs=1e-4)  # of 1.5 and 4
    assert facts["ms"] == {
        "time-attention 8x224: B=8 bfloat16 forward": {"cuda": 2.0, "triton": 3.0},
        "time-attention 8x224: B=8 bfloat16 forward+backward": {"cuda": 2.0, "triton": 8.0},
    }
    assert (facts["device"], facts["date"], facts["file"]) == ("A GPU", "2031-02-03", "0.result")
    assert frame[:5] == ("sm_90", ("bfloat16",), (64, 64), (129, 256), "triton")  # 197 members
    assert frame.reason["measured"]["ratio"] == 1.25


def test_the_class_row_of_space_attention_counts(choose):
    """256 places and the class row: too long for the kernels that serve 256."""
    shape = "8x256: B=8, N=256, T=8, 12 heads of 64"
    (made, *_) = choose(both(2.0, 3.0, scheme="space", locations=256, shape=shape))
    assert made.members == (257, None)


def test_the_rule_is_followed(choose, world):
    rules = choose(both(2.0, 3.0))
    world(*rules)
    half = torch.bfloat16
    assert [takes(m, half, 64) for m in (1, 16, 17)] == ["cuda", "cuda", "triton"]
    assert takes(8, half, 32) == takes(8, torch.float16, 64) == "triton"


@pytest.mark.parametrize("cuda, backend", [(2.05, "triton"), (1.95, "triton"), (1.9, "cuda"), (2.2, "triton")])
def test_a_tie_keeps_the_present_choice(choose, cuda, backend):
    (made, *_) = choose(both(cuda, 2.0, noise=0.03))
    assert made.backend == backend and made.reason["measured"]["noise"] == 0.03
    assert ("within the noise" in choice.why(made)) == (1.94 < cuda < 2.06)


def test_a_tie_keeps_what_was_measured_before(choose):
    choose(both(1.0, 2.0))
    (made, *_) = choose(both(2.01, 2.0, noise=0.03), table=choose.out)
    assert made.backend == "cuda"


def test_a_new_measurement_replaces_the_one_of_the_same_rule_alone(choose):
    first = choose(both(1.0, 2.0) + both(1.0, 2.0, scheme="space"))
    again = choose(both(3.0, 2.0), table=choose.out)
    assert len(again) == len(first) and again[0].backend == "triton" and again[1:] == first[1:]


def test_graphs_are_compared_where_both_have_one(choose):
    benches = [bench("cuda", 5.0, graph=1.0), bench("triton", 4.0, graph=2.0)]
    assert choose(benches)[0].reason["measured"]["ratio"] == 2.0
    benches = [bench("cuda", 5.0, graph=1.0), bench("triton", 4.0)]
    assert choose(benches)[0][4] == "triton"


def test_of_a_table_in_two_files_the_last_counts(choose):
    (made, *_) = choose(both(1.0, 2.0), both(3.0, 2.0))
    assert made.backend == "triton" and made.reason["measured"]["file"] == "1.result"


@pytest.mark.parametrize(
    "benches",
    [
        pytest.param([bench("triton", 2.0), bench("sdpa", 3.0)], id="one-row"),
        pytest.param([bench("triton", 2.0), bench("cuda", None, reason="no kernel")], id="one-cannot"),
        pytest.param(both(1.0, 2.0, device="cpu"), id="a-cpu"),
        pytest.param(both(1.0, 2.0, kind="module", op="block"), id="a-block"),
        pytest.param(both(1.0, 2.0, shape="tiny: B=2, N=10, T=3, 2 heads of 8"), id="a-rehearsal"),
    ],
)
def test_what_compares_nothing_changes_nothing(choose, benches, capsys):
    assert choose(benches) == expected_rules()
    assert "no table has both rows" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"benchmarks": [{}]}'], ids=["absent", "broken", "list", "foreign"])
def test_bad_files_are_one_clear_error(tmp_path, capsys, text):
    path, out = tmp_path / "result.json", tmp_path / "out.json"
    if text is not None:
        path.write_text(text)
    assert script().main([str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: file: ") and str(path) in said and not out.exists()


def test_a_folder_stands_for_its_files(tmp_path):
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).touch()
    assert script().paths([tmp_path, Path("x")]) == [tmp_path / "a.json", tmp_path / "b.json", Path("x")]


def test_rows_are_those_that_the_benchmark_writes():
    """The made-up rows above have the keys that the script reads in real ones."""
    from timesformer.benchmarking import core, machine, run, shapes

    problem = core.AttentionProblem("space", shapes.clip(8, 224, batch=8), torch.bfloat16)
    job = SimpleNamespace(facts={}, ceilings=SimpleNamespace(rates=lambda dtype: {}))
    base, made = run.Run._base(job, problem, "forward"), bench("cuda", 1.0, scheme="space")["extra_info"]
    assert {key: made[key] for key in base} == base
    assert script().SHAPE.search(base["shape"])[1] == "64"
    assert {"chip", "device"} <= machine.facts("cpu").keys()
    assert set(script().ROWS) <= set(core.AttentionProblem("time", shapes.TINY, torch.float32).rows())
