#!/usr/bin/env bash
# Makes .venv with the test extra and runs ruff, mypy and all tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment .venv "[test]"
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
