# SPDX-License-Identifier: Apache-2.0
"""Backends in the order in which `auto` tries them. They never import one another."""

from ..registry import register
from . import cpp, reference, triton

for _module in (triton, cpp, reference):
    register(_module.BACKEND)
