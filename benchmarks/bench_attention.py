# SPDX-License-Identifier: Apache-2.0
"""Time and space attention from the packed product of a model back into its layout: ours, SDPA, eager, a plain copy.

Group = scheme, shape, dtype and direction. Each row is checked against the oracle before it is timed.
"""

import peers


def pytest_generate_tests(metafunc):
    peers.parametrize(metafunc, "core")


def test_attention(measure, spec, direction, row):
    measure(peers.problem(*spec), row, direction, seconds=3.0, table_seconds=0.2)
