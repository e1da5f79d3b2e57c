# SPDX-License-Identifier: Apache-2.0
"""How often the model in the box is right: fresh clips, each written as an H.264 file, decoded and named.

    python scripts/demo_accuracy.py --clips 200 --seeds 1000000 2000000 3000000 --json accuracy.json

Ends non-zero where fewer than --least of the clips of a seed are named right.
"""

import argparse
import json
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

from timesformer.benchmarking.machine import facts
from timesformer.demo import Namer, write_clip


def measure(clips: int, seed: int) -> list[dict]:
    """The wrong answers among clips number seed, seed + 1, ..."""
    namer, wrong = Namer(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for number in range(seed, seed + clips):
            truth, answer = write_clip(path, number), namer(path)
            if answer.name != truth:
                wrong.append({"seed": number, "truth": truth, "answer": answer.name, "sure": answer.probability})
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200, help="for each seed (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1_000_000], help="of first clips (default: 1000000)")
    parser.add_argument("--least", type=float, default=0.95, help="part that must be right (default: 0.95)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers and their circumstances")
    args = parser.parse_args()
    command = shlex.join(["python", "scripts/demo_accuracy.py", *sys.argv[1:]])
    record = {"command": command, "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    record |= {"machine": facts("cpu"), "torch": torch.__version__, "seeds": {}}
    enough = True
    for seed in args.seeds:
        wrong = measure(args.clips, seed)
        for mistake in wrong:
            sure = f"{100 * mistake['sure']:.1f} %"
            print(f"clip {mistake['seed']}: {mistake['truth']}, named {mistake['answer']} ({sure})")
        right = args.clips - len(wrong)
        print(f"{right} of {args.clips} clips from {seed} on named right: {100 * right / args.clips:.1f} %")
        record["seeds"][seed] = {"clips": args.clips, "right": right, "wrong": wrong}
        enough = enough and right >= args.least * args.clips
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
