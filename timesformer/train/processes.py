# SPDX-License-Identifier: Apache-2.0
"""One process or several (torchrun): the same training, replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MODES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """This process among those of torchrun. mode: None alone, otherwise "ddp" or "fsdp"."""

    rank: int = 0
    world: int = 1
    mode: str | None = None
    device: str = "cpu"
    joined: bool = False  # here, and to be left by `stop`; False where the caller had done so before

    @classmethod
    def start(cls, mode: str, device: str) -> Processes:
        """Join torchrun's processes, or be the only one where there is none. Undone by `stop`.

        Raises ValueError for another mode.
        """
        if mode not in MODES:
            raise ValueError(f"distributed: got {mode!r}, expected one of {', '.join(MODES)}")
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        joined = not dist.is_initialized()
        if joined:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), mode, device, joined)

    def stop(self) -> None:
        if self.joined:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training; `model` itself keeps its parameters, sharded in place with "fsdp"."""
        if self.mode == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            devices = [self.device] if self.device.startswith("cuda") else None
            return DistributedDataParallel(model, device_ids=devices)
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.partition(":")[0], (self.world,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def accumulate(self, wrapped: nn.Module, last: bool):
        """A context for one micro-batch's forward and backward: gradients travel with the last one only."""
        if self.mode == "fsdp":
            wrapped.set_requires_gradient_sync(last)
        return wrapped.no_sync() if self.mode == "ddp" and not last else nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, on every one of them, in place."""
        if self.mode:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """True on every process where it is on one."""
        if not self.mode:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def get_state(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(weights, state of the optimiser by the names of parameters), whole and on the CPU, on the first process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(model, optimiser, options=options)

    def set_state(self, model: nn.Module, optimiser: torch.optim.Optimizer, weights: dict, state: dict) -> None:
        """Inverse of `get_state`; every process passes the whole state."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(model, optimiser, model_state_dict=weights, optim_state_dict=state, options=options)
