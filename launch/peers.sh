#!/usr/bin/env bash
# Measures fldist beside Flower's simulation engine and FedLab, run in turn on this machine, and prints the tables of
# docs/peers.md. Makes .venv (fldist) and .peers/flower and .peers/fedlab, with the versions of launch/peers/*.txt; the
# first time takes minutes and some GB. Needs Linux, MNIST (FLDIST_DATA: the folder that has MNIST/raw) and a machine
# that does nothing else. PASSES: how often all take their turn (default 3); ROUNDS: of each run (default 10). Further
# arguments go to launch/peers/compare.py: bash launch/peers.sh --json peers.json --work workload --epochs 5
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

# make_peer_environment NAME: .peers/NAME with the versions of launch/peers/NAME.txt. Does nothing when these are there.
make_peer_environment() {
    local dir=.peers/$1 pins=launch/peers/$1.txt stamp
    stamp=$(cksum <"$pins")
    if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    if [ ! -x "$dir/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$dir"
    fi
    echo "installing into $dir (the first time takes a few minutes)"
    # torch first and by its exact version, as in make_environment; the pins then keep it from being replaced
    "$dir/bin/pip" install --quiet --disable-pip-version-check "$(grep '^torch==' "$pins")"
    "$dir/bin/pip" install --quiet --disable-pip-version-check -r "$pins"
    echo "$stamp" >"$dir/.installed"
}

[ -f "${FLDIST_DATA:-}/MNIST/raw/train-images-idx3-ubyte" ] || {
    echo "FLDIST_DATA: '${FLDIST_DATA:-}' has no MNIST/raw/train-images-idx3-ubyte; set it to the folder that has" >&2
    exit 2
}
FLDIST_DATA=$(realpath "$FLDIST_DATA")
export FLDIST_DATA OMP_NUM_THREADS=1
make_environment .venv ""
make_peer_environment flower
make_peer_environment fedlab
exec .venv/bin/python launch/peers/compare.py --passes "${PASSES:-3}" --rounds "${ROUNDS:-10}" "$@"
