# SPDX-License-Identifier: Apache-2.0
"""The trained model in the box: a clip that did not exist before, as an H.264 file, and what happens in it.

pip install "timesformer-kernels[all]"
python examples/name_motion.py [NUMBER_OF_THE_CLIP]
"""

import secrets
import sys
import tempfile
from pathlib import Path

from timesformer.demo import Namer, write_clip


def main(number: str | None = None) -> None:
    seed = secrets.randbelow(10**9) if number is None else int(number)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        truth = write_clip(path, seed)
        answer = Namer()(path)
    print(f"clip {seed}: {answer.name} ({100 * answer.probability:.1f} %), drawn was: {truth}")


if __name__ == "__main__":
    main(*sys.argv[1:])
