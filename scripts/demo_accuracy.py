# SPDX-License-Identifier: Apache-2.0
"""How often the model in the box is right: fresh clips, each written as an H.264 file, decoded and named.

    python scripts/demo_accuracy.py --clips 200 --seed 1000000

Ends non-zero below --least.
"""

import argparse
import sys
import tempfile
from pathlib import Path

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
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first clip (default: 1000000)")
    parser.add_argument("--least", type=float, default=0.95, help="part that must be right (default: 0.95)")
    args = parser.parse_args()
    wrong = measure(args.clips, args.seed)
    for mistake in wrong:
        print(f"clip {mistake['seed']}: {mistake['truth']}, named {mistake['answer']} ({100 * mistake['sure']:.1f} %)")
    right = 1 - len(wrong) / args.clips
    print(f"{args.clips - len(wrong)} of {args.clips} clips named right: {100 * right:.1f} %")
    return 0 if right >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
