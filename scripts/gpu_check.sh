#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command: build, tests, sanitizers, graphs, large launches, benchmarks, resources.
#
#   scripts/gpu_check.sh --out DIR [--quick] [--cpu] [--only STAGE,...] [--force] [--list]
#
# At most 9 minutes on one H200, without network. Run it again with the same DIR to go on where it stopped. PYTHON names
# the interpreter that has torch (default: python3).
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/check.py" "$@"
