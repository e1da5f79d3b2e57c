# SPDX-License-Identifier: Apache-2.0
"""Sizes of one call, and the least work it takes: FLOP and bytes."""

from __future__ import annotations

from dataclasses import dataclass

CLS = {"time": "exclude", "space": "per_group"}  # the class-token modes of TimeSformer
DIRECTIONS = ("forward", "backward", "forward+backward")
FRAMES, PIXELS, HEAD_DIMS, BATCHES = (8, 16, 32, 64, 96), (224, 448), (32, 72, 80, 128), (1, 8, 64)
PATCH = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; height and width count patches. name: frames x pixels, as the README calls it."""

    name: str
    frames: int
    height: int
    width: int
    heads: int = 12
    head_dim: int = 64
    batch: int = 1

    @property
    def locations(self) -> int:
        """N of the paper."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Rows of one clip, the class row among them."""
        return 1 + self.locations * self.frames

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def label(self) -> str:
        """The name, and what differs from one clip of 12 heads of 64."""
        batch = f" B={self.batch}" if self.batch != 1 else ""
        heads = f" {self.heads}x{self.head_dim}" if (self.heads, self.head_dim) != (12, 64) else ""
        return self.name + batch + (heads if self.name != "tiny" else "")

    def __str__(self):
        heads = f"{self.heads} head{'s' if self.heads != 1 else ''} of {self.head_dim}"
        return f"{self.name}: B={self.batch}, N={self.locations}, T={self.frames}, {heads}"


def clip(frames: int, pixels: int, **more) -> Shape:
    """A square clip in patches of 16 x 16. Raises ValueError for pixels that no patch divides."""
    if pixels % PATCH:
        raise ValueError(f"img_size: got {pixels}, expected a multiple of {PATCH}")
    return Shape(f"{frames}x{pixels}", frames, pixels // PATCH, pixels // PATCH, **more)


# Nothing divides a vector or a tile, and a batch of 2 makes every flatten a real copy.
TINY = Shape("tiny", 3, 2, 5, heads=2, head_dim=8, batch=2)
TINY_SQUARE = Shape("tiny", 4, 4, 4, heads=4, head_dim=8, batch=2)  # Hugging Face's model knows square videos only


def quick_shapes(device: str) -> tuple[Shape, ...]:
    return (clip(8, 224, batch=8 if device == "cuda" else 1),)


def full_shapes(device: str) -> tuple[Shape, ...]:
    """All lengths, sizes and head widths; on a CPU those whose exact results take minutes, not hours."""
    (first,) = quick_shapes(device)
    widths = [clip(8, 224, head_dim=d, batch=first.batch) for d in HEAD_DIMS]
    if device == "cuda":
        sizes = [clip(t, p, batch=8) for p in PIXELS for t in FRAMES]
    else:
        sizes = [clip(t, 224) for t in (8, 16, 32, 96)] + [clip(16, 448)]
    return tuple(dict.fromkeys([first, *sizes, *widths]))


def attention_flops(shape: Shape, scheme: str, direction: str) -> int:
    """Two products of 2*D FLOP per query-key pair; the backward has five such products (scores once more)."""
    length = shape.frames if scheme == "time" else 1 + shape.locations
    groups = shape.locations if scheme == "time" else shape.frames
    product = 2 * shape.batch * shape.heads * shape.head_dim * groups * length**2
    return product * {"forward": 2, "backward": 5, "forward+backward": 7}[direction]


def attention_bytes(shape: Shape, direction: str, itemsize: int) -> int:
    """The least a kernel moves: q, k, v in and out; the backward reads q, k, v, dout and writes three gradients."""
    one = shape.batch * shape.tokens * shape.dim * itemsize
    return one * {"forward": 4, "backward": 7, "forward+backward": 11}[direction]
