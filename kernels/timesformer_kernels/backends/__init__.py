# SPDX-License-Identifier: Apache-2.0
"""Backends in the order in which `auto` tries them. They never import one another."""

from ..registry import register
from . import cpp, cuda, reference, triton

# Triton before CUDA C++ until both have been measured on a GPU, shape by shape.
for _module in (triton, cuda, cpp, reference):
    register(_module.BACKEND)
