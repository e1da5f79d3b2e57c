# SPDX-License-Identifier: Apache-2.0
"""The training loop. What a step computes is a function of the weights, the recipe and the step's number.

So a training that is stopped anywhere and resumed ends with the weights it would have had, bit for bit on the same
machine, and several processes compute what one does, up to the order of sums.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from ..files import whole
from . import checkpoint
from .data import SKIP, Batch, Source, parts_of, seed_model, stream, validation
from .metrics import Metrics
from .processes import Processes
from .recipe import Recipe

MODEL = "model"  # the folder of the trained model
RECORD = "training.json"  # in it


class Stopped(Exception):
    """A signal asked for the end; the state is saved. Carries the number of the signal."""


@dataclass
class Trainer:
    """Trains `model` on `source` by `recipe` and keeps everything in `folder`.

    checkpoint.pt: the state, anew every save_every steps (0: every epoch) and at a signal. metrics.jsonl: a line every
    log_every steps and for each epoch's validation. model/: the result, as `TimeSformer.from_pretrained` reads it.
    """

    model: torch.nn.Module
    source: Source
    recipe: Recipe
    folder: Path
    processes: Processes = field(default_factory=Processes)
    workers: int = 0
    save_every: int = 0
    log_every: int = 10
    resume: bool = False
    command: str = ""

    def __post_init__(self):
        parts_of(self.recipe, self.processes.rank, self.processes.world)  # raises where they cannot be shared
        self.epoch = max(len(self.source) // self.recipe.batch_size, 1)  # steps, rounded down
        self.total = self.recipe.steps(len(self.source))
        self.step, self.skipped = 0, 0
        self.path = self.folder / checkpoint.NAME
        self.reported: set[str] = set()

    # state

    def _facts(self) -> dict:
        config = self.model.config.to_dict()
        return {"model": config, "recipe": self.recipe.to_dict(), "data": self.source.facts()}

    def _start(self) -> None:
        """The optimiser and the wrapped model, fresh or from the checkpoint."""
        facts, size = self._facts(), 0
        saved = None
        if self.resume:
            saved = checkpoint.load(self.path)
            checkpoint.check(self.path, saved["facts"], facts)
        elif self.path.exists():
            raise FileExistsError(f"{self.path} exists: pass --resume to go on with it, or another --out")
        self.model.to(self.processes.device).train()
        self.wrapped = self.processes.wrap(self.model)
        self.optimiser = self.recipe.make_optimiser(self.model)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.recipe.amp == "float16")
        if saved:
            self.step, self.skipped, size = saved["step"], saved["skipped"], saved["metrics_size"]
            self.processes.set_state(self.model, self.optimiser, saved["weights"], saved["optimiser"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
        self.metrics = Metrics(self.folder, size=size, step=self.step) if self.processes.first else None

    @property
    def device(self) -> str:
        return self.processes.device.partition(":")[0]

    def save(self) -> None:
        """Write the checkpoint; every process calls it."""
        weights, state = self.processes.get_state(self.model, self.optimiser)
        if not self.processes.first:
            return
        if not all(value.isfinite().all() for value in weights.values()):
            raise RuntimeError(f"step {self.step}: the weights are no longer finite and are not saved. A lower --lr?")
        checkpoint.save(
            self.path,
            {
                "facts": self._facts(),
                "step": self.step,
                "skipped": self.skipped,
                "metrics_size": self.metrics.size(),
                "weights": weights,
                "optimiser": state,
                "scaler": self.scaler.state_dict(),
                "command": self.command,
            },
        )

    # steps

    def _autocast(self):
        dtype = None if self.recipe.amp == "off" else getattr(torch, self.recipe.amp)
        return torch.autocast(self.device, dtype=dtype, enabled=dtype is not None)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of a micro-batch."""
        clips, labels = batch.clips.to(self.processes.device), batch.labels.to(self.processes.device)
        with self._autocast():
            logits = self.wrapped(clips)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)

    def _one_step(self, batches) -> float:
        """Gradients of every part, one update. -> the step's loss, over all processes."""
        parts = parts_of(self.recipe, self.processes.rank, self.processes.world)
        self.optimiser.zero_grad(set_to_none=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(self.step, len(self.source))
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for part in parts:
            batch = next(batches)
            self._report(batch.problems)
            seed_model(self.recipe.seed, self.step, part)
            with self.processes.accumulate(self.wrapped, last=part == parts[-1]):
                loss = self._loss(batch) / len(parts)  # processes are averaged when gradients travel
                self.scaler.scale(loss).backward()
            total += loss.detach().double()
        self.scaler.unscale_(self.optimiser)
        if self.recipe.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        loss = float(self.processes.sum(total)) / self.processes.world
        if not math.isfinite(loss):
            raise RuntimeError(f"step {self.step}: the loss is {loss}; checkpoints up to then are kept. A lower --lr?")
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        return loss

    def _report(self, problems: list[str]) -> None:
        """Count what could not be read; name each file once."""
        self.skipped += len(problems)
        for line in problems:
            if line not in self.reported:
                self.reported.add(line)
                print(f"timesformer train: skipped: {line}", file=sys.stderr)

    def validate(self) -> dict:
        """{"top1", "top5", "loss", "clips"} over the held-out clips that can be read, in evaluation mode."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.processes.device)
        loader = validation(
            self.source, self.recipe.micro_batch, rank=self.processes.rank, world=self.processes.world,
            workers=self.workers,
        )  # fmt: skip
        self.wrapped.eval()
        with torch.no_grad():
            for batch in loader:
                self._report(batch.problems)
                with self._autocast():
                    logits = self.wrapped(batch.clips.to(self.processes.device)).float()
                counts = batch.labels != SKIP
                logits, labels = logits[counts.to(logits.device)], batch.labels[counts].to(logits.device)
                best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([best[:, 0].sum(), best.sum(), loss, counts.sum()]).to(sums)
        self.wrapped.train()
        top1, top5, loss, clips = self.processes.sum(sums).tolist()
        clips = int(clips)
        if not clips:
            raise RuntimeError("not one of the validation clips can be read")
        return {"top1": top1 / clips, "top5": top5 / clips, "loss": loss / clips, "clips": clips}

    # the whole

    def run(self, show=lambda step, total, text: None) -> dict:
        """Train to the end, or raise Stopped at SIGINT or SIGTERM, with the state saved. -> the last validation.

        show(step, total, text) is called after every step, on the first process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start()
        try:
            with _signals() as caught:
                return self._steps(caught, show)
        finally:
            if self.metrics:
                self.metrics.close()

    def _steps(self, caught: list[int], show) -> dict:
        every = self.save_every or self.epoch
        loader = stream(
            self.source, self.recipe, self.step, self.total, rank=self.processes.rank, world=self.processes.world,
            workers=self.workers,
        )  # fmt: skip
        batches, last = iter(loader), {}
        losses, seconds = [], 0.0
        while self.step < self.total:
            began = time.perf_counter()
            losses.append(self._one_step(batches))
            seconds += time.perf_counter() - began
            if self.processes.first:
                show(self.step, self.total, f"loss {losses[-1]:.3f}")
            if self.step % self.log_every == 0 or self.step == self.total:
                self._log(losses, seconds)
                losses, seconds = [], 0.0
            if self.step % self.epoch == 0 or self.step == self.total:
                last = self._validate_and_log()
            stop = self.processes.any(bool(caught))
            if stop or self.step % every == 0 or self.step == self.total:
                self.save()
            if stop and self.step < self.total:
                raise Stopped(caught[0] if caught else signal.SIGTERM)
        self._save_model(last)
        return last

    def _log(self, losses: list[float], seconds: float) -> None:
        if self.metrics:
            values = {
                "epoch": round(self.step * self.recipe.batch_size / len(self.source), 4),
                "loss": sum(losses) / len(losses),
                "lr": self.recipe.lr_at(self.step - 1, len(self.source)),
                "clips_per_second": round(len(losses) * self.recipe.batch_size / seconds, 2),
                "skipped": self.skipped,
            }
            self.metrics.write(self.step, values)

    def _validate_and_log(self) -> dict:
        if not self.source.validation_length():
            return {}
        result = self.validate()
        if self.metrics:
            self.metrics.write(self.step, {"val": result})
        return result

    def _save_model(self, validation: dict) -> None:
        """model/: the weights, and in training.json how they came about."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        from ..model import TimeSformer

        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.processes.first:
            trained = TimeSformer.from_config(self.model.config)
            trained.load_state_dict(weights)
            trained.save_pretrained(self.folder / MODEL)
            record = {
                "command": self.command,
                "steps": self.total,
                "validation": validation,
                "torch": torch.__version__,
            }
            record |= {"recipe": self.recipe.to_dict(), "data": self.source.facts(), "skipped": self.skipped}
            record |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
            with whole(self.folder / MODEL / RECORD) as path:
                path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _signals():
    """Give a list to which SIGINT and SIGTERM are added, in place of what they do; a second one does it."""
    caught: list[int] = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
