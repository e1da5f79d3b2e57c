# SPDX-License-Identifier: Apache-2.0
"""The rates this machine reaches: a copy, and square matrix products in float32, tf32, bfloat16 and float16."""

from __future__ import annotations

import sys

from probe import Checks, options


def main() -> int:
    args = options(__doc__.split(":")[0] + ".")
    import torch

    from timesformer.benchmarking.machine import Ceilings

    checks, device = Checks(args.json, "rates"), "cpu" if args.cpu else "cuda"
    rates, copy = {}, 0.0
    for name in ("float32", "tf32", "bfloat16", "float16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        ceilings = Ceilings(device, small=args.cpu)  # anew for each: it measures a dtype once
        ceilings.seconds = 0.0 if args.cpu else 0.2
        with checks.check(name) as say:
            found = ceilings.rates(getattr(torch, name.replace("tf32", "float32")))
            copy = max(copy, found["peak_copy_GBps"])
            rates[name] = found["peak_matmul_GFLOPps"] / 1e3
            say(f"{rates[name]:.3g} TFLOP/s, copy {found['peak_copy_GBps']:.0f} GB/s", **found)
    checks.facts |= {"copy_GBps": copy, "matmul_TFLOPps": rates}
    products = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    return checks.end(f"copy {copy:.0f} GB/s; TFLOP/s: {products}")


if __name__ == "__main__":
    sys.exit(main())
