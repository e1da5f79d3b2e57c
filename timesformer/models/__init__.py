# SPDX-License-Identifier: Apache-2.0
"""The original project's import path."""
