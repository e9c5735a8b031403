#!/usr/bin/env bash
# Runs every algorithm of the FedAvg family on configs/family/*.yaml with three seeds, and prints the table of
# docs/family.md. Needs MNIST and Fashion-MNIST (FLDIST_DATA, or: fldist data prepare mnist). JOBS runs go at once
# (default 2), each in one process with one thread; their lines go to the file LOG. What is finished in OUT (default
# runs/family) is not run again. Further arguments are overrides for every run: bash launch/family.sh rounds=2
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment .venv ""
export OMP_NUM_THREADS=1
out=${OUT:-runs/family}
algorithms=(
    "fedavg algorithm.name=fedavg"
    "fedprox algorithm.name=fedprox algorithm.mu=0.01"
    "scaffold algorithm.name=scaffold"
    "fednova algorithm.name=fednova"
    "moon algorithm.name=moon algorithm.mu=1"
    "fedopt-heavy_ball algorithm.name=fedopt algorithm.optimizer=heavy_ball algorithm.lr=1"
    "fedopt-ema algorithm.name=fedopt algorithm.optimizer=ema algorithm.lr=1"
    "fedopt-adam algorithm.name=fedopt algorithm.optimizer=adam algorithm.lr=0.01"
    "fedopt-yogi algorithm.name=fedopt algorithm.optimizer=yogi algorithm.lr=0.01"
    "fedopt-adagrad algorithm.name=fedopt algorithm.optimizer=adagrad algorithm.lr=0.01"
    "local algorithm.name=local"
    "centralised algorithm.name=centralised"
)
for config in configs/family/*.yaml; do
    for line in "${algorithms[@]}"; do
        read -r name fields <<<"$line"
        for seed in 0 1 2; do
            directory=$out/$(basename "$config" .yaml)/$name-s$seed
            if ! grep -q '"status": "finished"' "$directory/result.json" 2>/dev/null; then
                rm -rf "$directory"
                echo "$config $fields seed=$seed $* --output $directory"
            fi
        done
    done
done | xargs -r -P "${JOBS:-2}" -L 1 .venv/bin/fldist run >"${LOG:-/dev/null}"
.venv/bin/python - "$out" <<'EOF'
import json, statistics, sys
from pathlib import Path

table = {}
for path in sorted(Path(sys.argv[1]).glob("*/*/result.json")):
    name = path.parent.name.rpartition("-s")[0]
    table.setdefault(path.parts[-3], {}).setdefault(name, []).append(json.loads(path.read_text()))
for config, rows in table.items():
    print(f"\n{config}\n{'algorithm':<20}{'accuracy %':>12}{'std':>7}{'loss':>8}{'MB up':>9}{'MB down':>9}{'seconds':>9}")
    for name, results in rows.items():
        accuracy = [100 * r["final"]["accuracy"] for r in results]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else float("nan")
        loss = statistics.mean(r["final"]["loss"] for r in results)
        up, down = (statistics.mean(r["bytes"]["logical"][way] for r in results) / 1e6 for way in ("up", "down"))
        seconds = statistics.mean(r["seconds"]["total"] for r in results)
        mean = statistics.mean(accuracy)
        print(f"{name:<20}{mean:>12.2f}{spread:>7.2f}{loss:>8.3f}{up:>9.2f}{down:>9.2f}{seconds:>9.1f}")
EOF
