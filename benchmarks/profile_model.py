# SPDX-License-Identifier: Apache-2.0
"""Where a forward of the fused model spends its time: `python benchmarks/profile_model.py --threads 2`.

By torch's profiler. Products are torch's; "bias copies" are what torch.addmm does before one of them, writing the bias
into every row of the result; the rest is our kernels, which the profiler does not see, and the host.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from timesformer import TimeSformer
from timesformer.benchmarking.machine import facts

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def measure(img_size: int, frames: int, rounds: int = 5) -> dict:
    """Milliseconds of a forward of one clip in float32 on the CPU: in all, and of each part."""
    torch.manual_seed(0)
    model = TimeSformer(img_size=img_size, num_frames=frames).eval().fuse()
    clip = torch.randn(1, 3, frames, img_size, img_size)
    with torch.no_grad():
        for _ in range(2):
            model(clip)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            for _ in range(rounds):
                with torch.profiler.record_function("forward"):
                    model(clip)
    total = products = copies = 0.0
    for row in seen.key_averages(group_by_input_shape=True):
        shapes = row.input_shapes
        if row.key == "forward":
            total = row.cpu_time_total
        elif row.key in PRODUCTS:
            products += row.self_cpu_time_total
        elif row.key == "aten::copy_" and len(shapes[0]) == 2 and shapes[0] == shapes[1]:
            copies += row.self_cpu_time_total
    parts = {"forward": total, "products": products, "bias copies": copies, "rest": total - products - copies}
    return {name: round(value / 1e3 / rounds, 2) for name, value in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = {"frames": options.frames, "img_size": options.img_size, "batch": 1, "dtype": "float32"}
    found = {**facts("cpu"), **shape, "ms": measure(options.img_size, options.frames), "date": f"{date.today()}"}
    print(json.dumps(found["ms"]))
    if options.out:
        sizes = f"--img-size {options.img_size} --frames {options.frames} --threads {options.threads}"
        found["command"] = f"python benchmarks/profile_model.py {sizes}"
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
