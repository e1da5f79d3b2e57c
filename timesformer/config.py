# SPDX-License-Identifier: Apache-2.0
"""What a TimeSformer is, apart from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .layers import pair

ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")
_RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate")
_COUNTS = ("in_chans", "num_frames", "embed_dim", "depth", "num_heads")


@dataclass(frozen=True)
class TimeSformerConfig:
    """Sizes, rates and labels of a TimeSformer; the defaults are TimeSformer-B.

    img_size, patch_size: pixels, an int or (height, width). id2label: class number -> name, where known. preset: name
    of the recipe in `timesformer.presets` that the weights were trained with, where known.

    Raises ValueError or TypeError naming the field that is wrong.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_chans: int = 3
    num_classes: int = 400
    num_frames: int = 8
    attention_type: str = "divided_space_time"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-6
    id2label: dict[int, str] | None = None
    preset: str | None = None

    def __post_init__(self):
        for name in _COUNTS:
            _check_int(name, getattr(self, name), 1)
        _check_int("num_classes", self.num_classes, 0)
        for name in ("img_size", "patch_size"):
            size = getattr(self, name)
            if isinstance(size, list):
                size = tuple(size)
                object.__setattr__(self, name, size)
            if isinstance(size, tuple) and len(size) != 2:
                raise ValueError(f"{name}: got {size}, expected an int or (height, width)")
            for n in size if isinstance(size, tuple) else (size,):
                _check_int(name, n, 1)
        if any(n % p for n, p in zip(pair(self.img_size), pair(self.patch_size), strict=True)):
            raise ValueError(f"img_size: got {self.img_size}, expected a multiple of patch_size = {self.patch_size}")
        if self.attention_type not in ATTENTION_TYPES:
            raise ValueError(
                f"attention_type: got {self.attention_type!r}, expected one of {', '.join(ATTENTION_TYPES)}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of embed_dim = {self.embed_dim}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio: got {self.mlp_ratio}, expected a positive number")
        for name in _RATES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a rate in [0, 1)")
        if self.id2label is not None:
            object.__setattr__(self, "id2label", {int(key): str(label) for key, label in self.id2label.items()})

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patch grid that the position table covers."""
        (height, width), (p, q) = pair(self.img_size), pair(self.patch_size)
        return height // p, width // q

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimeSformerConfig:
        """Inverse of `to_dict`; absent fields take their defaults. Raises ValueError listing unknown fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown fields {', '.join(unknown)}")
        return cls(**values)


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
