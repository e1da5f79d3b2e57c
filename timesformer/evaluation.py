# SPDX-License-Identifier: Apache-2.0
"""Several views of a video to one answer, and the accuracy over labelled videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .video.loading import Loaded

AGGREGATES = ("logits", "prob")


def aggregate(logits: Tensor, how: str = "logits") -> Tensor:
    """Logits of the views [V, C] -> probabilities [C], float64, that sum to 1.

    "logits": softmax of their mean, which orders the classes as the original's sum does. "prob": mean of the softmax
    of each, as the paper says. Raises ValueError for another name or logits that are not finite.
    """
    if how not in AGGREGATES:
        raise ValueError(f"aggregate: got {how!r}, expected one of {', '.join(AGGREGATES)}")
    logits = logits.double()
    if not logits.isfinite().all():
        raise ValueError("the model's answer is not finite")
    return logits.mean(0).softmax(0) if how == "logits" else logits.softmax(1).mean(0)


def predict(model: nn.Module, views: Tensor, *, batch: int = 1) -> Tensor:
    """Views [V, 3, T, height, width] float32, on any device -> logits [V, C] float64 on the CPU.

    `batch` views go through the model at once, in its own dtype and on its own device.
    """
    parameter = next(model.parameters())
    with torch.inference_mode():
        parts = [model(part.to(device=parameter.device, dtype=parameter.dtype)) for part in views.split(batch)]
    return torch.cat(parts).double().cpu()


@dataclass
class Accuracy:
    """Counts over labelled videos. videos: an entry each, in order; skipped: {"video", "error"} of the unreadable."""

    classes: int
    top1: int = 0
    top5: int = 0
    loss: float = 0.0  # summed
    videos: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    def add(self, path: str, label: int, probabilities: Tensor) -> None:
        best = probabilities.topk(min(5, self.classes)).indices.tolist()
        self.top1 += best[0] == label
        self.top5 += label in best
        self.loss -= probabilities[label].clamp_min(torch.finfo(torch.float64).tiny).log().item()
        answer = {"video": path, "label": label, "answer": best[0], "probability": probabilities[best[0]].item()}
        self.videos.append({**answer, "right": best[0] == label})

    def summary(self) -> dict:
        """{"videos", "skipped", "top1", "top5", "mean_class", "loss"}: counts, then parts of 1, then the mean loss.

        mean_class averages the classes' own top-1 accuracies, so that frequent classes do not outweigh rare ones.
        """
        number = len(self.videos)
        by_class: dict[int, list[bool]] = {}
        for video in self.videos:
            by_class.setdefault(video["label"], []).append(video["right"])
        return {
            "videos": number,
            "skipped": len(self.skipped),
            "top1": self.top1 / number,
            "top5": self.top5 / number,
            "mean_class": sum(sum(right) / len(right) for right in by_class.values()) / len(by_class),
            "loss": self.loss / number,
        }


def evaluate(
    model: nn.Module,
    loaded: Iterable[Loaded],
    labels: Iterable[int],
    *,
    how: str = "logits",
    batch: int = 1,
    strict: bool = False,
    seen: Callable[[Loaded], None] = lambda video: None,
) -> Accuracy:
    """Answers for every loaded video, and how many are right. seen(video) is called before each.

    A video that could not be read is skipped and listed; with strict=True it raises ValueError.
    """
    result = Accuracy(model.config.num_classes)
    for video, label in zip(loaded, labels, strict=True):
        seen(video)
        if video.error is None:
            result.add(video.path, label, aggregate(predict(model, video.views, batch=batch), how))
        elif strict:
            raise ValueError(video.error)
        else:
            result.skipped.append({"video": video.path, "error": video.error})
    return result
