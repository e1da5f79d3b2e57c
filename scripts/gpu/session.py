# SPDX-License-Identifier: Apache-2.0
"""A Session's calls, CUDA graphs on a GPU, against plain ones and its peers': the same logits, and the time of a call.

Milliseconds are wall-clock from the call to the end of its work, the median of rounds in which all take turns: what a
server sees that answers one request after the other.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from probe import Checks, options

from timesformer import TimeSformer
from timesformer.benchmarking.block import with_sdpa
from timesformer.benchmarking.modules import randomise
from timesformer.inference import Session


def hugging_face(net: TimeSformer, cpu: bool):
    """Their model around the same parameters, with SDPA and without; none where it is not installed."""
    try:
        from transformers import TimesformerConfig, TimesformerForVideoClassification
    except ImportError:
        return {}
    from timesformer.weights import from_native

    sizes = dict(image_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    config = TimesformerConfig(num_frames=2 if cpu else 8, num_labels=5 if cpu else 400, **(sizes if cpu else {}))
    found = {}
    for name in ("Hugging Face", "Hugging Face, SDPA"):
        with torch.device("meta"):
            theirs = TimesformerForVideoClassification(config)
        theirs.load_state_dict(from_native(dict(net.named_parameters()), "huggingface"), assign=True)
        theirs = theirs.eval() if name == "Hugging Face" else with_sdpa(theirs.eval())
        found[name] = lambda x, theirs=theirs: theirs(x.transpose(1, 2)).logits
    return found


def medians(runs: dict, video: torch.Tensor, rounds: int) -> dict[str, float]:
    """{name: milliseconds}"""
    wait = torch.cuda.synchronize if video.is_cuda else lambda: None
    seen = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run(video)
            wait()
            if i >= 3:
                seen[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 4) for name, times in seen.items()}


def main() -> int:
    args = options(__doc__.split(",")[0] + ".")
    checks, device = Checks(args.json, "shapes"), "cpu" if args.cpu else "cuda"
    dtype = torch.float32 if args.cpu else torch.bfloat16
    sizes = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5) if args.cpu else {}
    net = randomise(TimeSformer(**sizes, num_frames=2 if args.cpu else 8)).to(device, dtype)
    frames = (3, 2, 32, 32) if args.cpu else (3, 8, 224, 224)
    shapes = [(batch, *frames) for batch in ((1, 2) if args.cpu else (1, 8))]
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        session = Session(net, shapes)
        runs = {"session": session, "plain": net, **hugging_face(net, args.cpu)}
        for shape in shapes:
            with checks.check(f"batch {shape[0]}") as say:
                video = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
                truth = exact(video.double())
                errors = {name: ((run(video) - truth).norm() / truth.norm()).item() for name, run in runs.items()}
                found = medians(runs, video, 3 if args.cpu else 40)
                say(", ".join(f"{name} {ms:.3g} ms" for name, ms in found.items()), milliseconds=found, errors=errors)
                limit = 1e-4 if args.cpu else 5e-2
                if not errors["session"] <= limit:
                    raise AssertionError(f"logits differ from float64 by {errors['session']:.1e} of their norm")
    rows = [f"B={shape[0]}: {checks.found[f'batch {shape[0]}']['text']}" for shape in shapes]
    return checks.end("; ".join(rows))


if __name__ == "__main__":
    sys.exit(main())
