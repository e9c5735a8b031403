#!/usr/bin/env bash
# One run over several machines with torchrun (gloo). Two ways:
#   on every machine, i = 0, 1, 2:
#       NNODES=3 NODE_RANK=i MASTER_ADDR=node0 bash launch/torchrun-nodes.sh CONFIG key=value
#   on one machine, by ssh:
#       HOSTS="node0 node1 node2" bash launch/torchrun-nodes.sh CONFIG key=value
# Arguments go to `fldist run`. Machine 0 is the server's; the checkout is at the same path everywhere.
#   PER_NODE      ranks on each machine (default 1). With 1 every rank has an agent of its own: a host that dies is
#                 started again, and so is the server. With more, torchrun ends all of a machine's ranks when one dies.
#   MAX_RESTARTS  how often (default 100 with PER_NODE=1, else 0: start the same command again, it goes on)
#   MASTER_PORT   default 29500; the server's own port is the next one, or network.control_port
#   OUTPUT        the run's directory (default runs/torchrun-nodes), best on a file system that all machines see
#   GLOO_SOCKET_IFNAME  the network interface, where a machine has several
#   PYTHON        default .venv/bin/python where there is one, else python3
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/cluster.sh
need_configuration "$@"

if [ -n "${HOSTS:-}" ] && [ -z "${NODE_RANK:-}" ]; then
    read -ra hosts <<<"$HOSTS"
    settings="NNODES=${#hosts[@]} MASTER_ADDR=$(printf %q "${MASTER_ADDR:-${hosts[0]}}")"
    for name in PER_NODE MAX_RESTARTS MASTER_PORT OUTPUT GLOO_SOCKET_IFNAME PYTHON PYTHONPATH FLDIST_DATA \
        FLDIST_CACHE OMP_NUM_THREADS; do
        [ -z "${!name:-}" ] || settings+=" $name=$(printf %q "${!name}")"
    done
    pids=()
    for i in "${!hosts[@]}"; do
        # -tt: what was started there ends when this script ends
        ssh -tt "${hosts[i]}" "cd $(printf %q "$PWD") && exec env $settings NODE_RANK=$i \
            bash launch/torchrun-nodes.sh $(printf '%q ' "$@")" </dev/null &
        pids+=($!)
    done
    trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
    code=0
    for pid in "${pids[@]}"; do
        wait "$pid" || { now=$?; [ "$code" -ne 0 ] || code=$now; }
    done
    exit "$code"
fi

python=$(find_python)
per_node=${PER_NODE:-1}
restarts=$([ "$per_node" = 1 ] && echo 100 || echo 0)
exec "$python" -m torch.distributed.run \
    --nnodes "${NNODES:?torchrun-nodes.sh: set NNODES to the number of machines (or HOSTS to their names)}" \
    --node-rank "${NODE_RANK:?torchrun-nodes.sh: set NODE_RANK to the number of this machine, from 0}" \
    --master-addr "${MASTER_ADDR:?torchrun-nodes.sh: set MASTER_ADDR to the name or address of machine 0}" \
    --master-port "${MASTER_PORT:-29500}" --nproc-per-node "$per_node" --max-restarts "${MAX_RESTARTS:-$restarts}" \
    -m fldist run --output "${OUTPUT:-runs/torchrun-nodes}" "$@"
