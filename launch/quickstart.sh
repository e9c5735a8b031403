#!/usr/bin/env bash
# Makes .venv, installs fldist, and runs the main job: a server and two hosts on this machine.
# Further arguments go to `fldist run`, e.g.: bash launch/quickstart.sh algorithm.name=scaffold
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment .venv ""
.venv/bin/fldist run configs/quickstart.yaml --nproc 3 "$@"
