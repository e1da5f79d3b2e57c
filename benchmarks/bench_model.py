# SPDX-License-Identifier: Apache-2.0
"""TimeSformer-B: ours, Hugging Face's model around the same weights, and the products alone; forward, with --full all.

"products" runs every Linear of the model and the patch projection, nothing else: what no attention kernel can save. The
list is in `timesformer.benchmarking.model`; here it is checked against what the model is counted to do.
"""

import peers
import torch
from torch.utils.flop_counter import FlopCounterMode

import timesformer_kernels.flops  # noqa: F401  before any FlopCounterMode
from timesformer.benchmarking.shapes import BATCHES

ATEN_PRODUCTS = ("addmm", "mm", "linear")


def pytest_generate_tests(metafunc):
    if "spec" in metafunc.fixturenames:
        dtypes = (torch.bfloat16,) if peers.DEVICE == "cuda" else (torch.float32,)
        batches = BATCHES if peers.DEVICE == "cuda" else ()
        peers.parametrize(metafunc, "model", directions=("forward",), dtypes=dtypes, batches=batches)


def product_flops(call):
    """FLOP of the matrix products in one call, those of attention left out."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if op.__name__.split(".")[0] in ATEN_PRODUCTS)


def check_products(problem):
    """The list of products is complete: as many FLOP as our model's, with hooks that keep it from folding any."""
    model = problem.module
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        with torch.no_grad():
            expected = product_flops(lambda: model(problem.x))
            got = product_flops(problem.timed("products", "forward"))
    finally:
        for hook in hooks:
            hook.remove()
    assert got == expected, f"products: {got} FLOP, the unfused model has {expected}"
    assert got == problem.flops("products", "forward")


def test_model(measure, benchmark, spec, direction, row):
    problem = peers.problem(*spec)
    if row == "products":
        check_products(problem)
    medians = measure(problem, row, direction, seconds=36.0, warmup=1, least=4, table_seconds=0)
    if medians:
        benchmark.extra_info["ratio_to_products"] = medians[row] / medians["products"]
