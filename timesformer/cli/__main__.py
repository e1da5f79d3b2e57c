# SPDX-License-Identifier: Apache-2.0
"""`python -m timesformer.cli`, for where the console script is not on the path."""

from . import main

raise SystemExit(main())
