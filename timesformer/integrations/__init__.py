# SPDX-License-Identifier: Apache-2.0
"""Our kernels in models of other libraries, by one line."""

from .hugging_face import accelerate_transformers, restore

__all__ = ["accelerate_transformers", "restore"]
