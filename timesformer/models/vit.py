# SPDX-License-Identifier: Apache-2.0
"""The original project's import path: `from timesformer.models.vit import TimeSformer`."""

from ..model import TimeSformer

__all__ = ["TimeSformer"]
