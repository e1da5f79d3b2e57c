# SPDX-License-Identifier: Apache-2.0
"""Backends in the order in which `auto` tries them, where no rule of `choice` names one. None imports another."""

from ..registry import register
from . import cpp, cuda, reference, triton

for _module in (triton, cuda, cpp, reference):
    register(_module.BACKEND)
