# SPDX-License-Identifier: Apache-2.0
"""What runs under compute-sanitizer: forward and backward of every kernel on tiny shapes, each tensor an allocation.

--plant makes one of two mistakes on purpose instead, so that a tool that sees nothing does not pass for a clean one.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # inside a block of torch's cache no access is out of bounds
import torch
import triton
import triton.language as tl
from calls import every_kernel
from probe import options

END = "calls ran to their end"


@triton.jit
def planted_write(out_ptr, n, BLOCK: tl.constexpr):
    """Writes one element past the end."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, at.to(tl.float32), mask=at < n + 1)


@triton.jit
def planted_read(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Reads what nothing has written."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at) + 1)


def plant(kind: str) -> None:
    if kind == "write":
        planted_write[(1,)](torch.empty(100, device="cuda"), 100, BLOCK=128)
    else:
        planted_read[(1,)](torch.empty(128, device="cuda"), torch.empty(128, device="cuda"), BLOCK=128)
    torch.cuda.synchronize()


def main() -> int:
    more = ("--plant", dict(choices=("write", "read"))), ("--part", dict(help="K/N: every N-th call, from the K-th on"))
    args = options(__doc__.split(":")[0] + ".", *more)
    if args.plant:
        plant(args.plant)
        return 0
    first, step = map(int, args.part.split("/")) if args.part else (0, 1)
    device = "cpu" if args.cpu else "cuda"
    done = 0
    for call in every_kernel(args.cpu)[first::step]:
        for x in call.both(*call.operands(device)):
            if not x.isfinite().all():
                raise AssertionError(f"{call}: a result is not finite")
        done += 1
        print(call, flush=True)
    print(f"{done} {END}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
