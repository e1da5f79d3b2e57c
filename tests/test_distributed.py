# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel and FSDP2 on two processes: the gradients of one process, whatever training keeps."""

import copy
import subprocess
import sys
from pathlib import Path

import blocks
import pytest
import torch
import torch.distributed as dist
from blocks import TINY, clip

from timesformer import TimeSformer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def model_of(mode):
    generator = torch.Generator().manual_seed(0)
    model = TimeSformer(**{**TINY, "embed_dim": 16, "num_heads": 2}, drop_path_rate=0.0, checkpoint=mode)
    return blocks.randomise(model.double(), generator).train(), clip(generator, 4)


def gradients(model):
    """{name: gradient}, gathered where they are sharded, without the names that wrappers add."""
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = grad
    return found


def work(rank, file):
    """What each of two processes does: half of the clips, and a comparison with all of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for mode in ("none", "light", "full"):
        model, video = model_of(mode)
        single = copy.deepcopy(model)
        single(video).square().sum().div(2).backward()  # the mean over processes of the sum over clips
        expected = gradients(single)
        sharded = copy.deepcopy(model)
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        for twin in (DistributedDataParallel(copy.deepcopy(model)), fully_shard(sharded, mesh=mesh)):
            twin(video.chunk(2)[rank]).square().sum().backward()
            got = gradients(twin)
            assert got.keys() == expected.keys()
            for name, exact in expected.items():
                torch.testing.assert_close(got[name], exact, rtol=1e-9, atol=1e-10, msg=f"{mode} {name}: {{}}".format)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t; t.work"
    code = f"{code}(int(sys.argv[1]), sys.argv[2])"
    run = [[sys.executable, "-c", code, str(rank), str(tmp_path / "meeting")] for rank in range(2)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in run]
    try:
        texts = [process.communicate(timeout=400)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(texts)
