# Sourced by the scripts beside it that run on several machines.

# find_python: prints the path of PYTHON, or else of .venv's python where there is one, or else of python3.
find_python() {
    local python=${PYTHON:-python3}
    [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
    command -v "$python" || { echo "PYTHON: $python is no program; name the python that has fldist" >&2; return 2; }
}

# need_configuration ARGUMENT...: fails unless there is an argument.
need_configuration() {
    [ $# -gt 0 ] || { echo "$(basename "$0"): give a configuration, e.g. configs/quickstart.yaml" >&2; return 2; }
}

# run_step COMMAND...: runs the step of a Slurm job and returns its exit code. USR1, by which Slurm announces the job's
# end, is handed on to it. When that ended the run, the job goes back into the queue: `fldist run` then ends with 138
# (128 + USR1), torchrun with 1. A run that fails by itself, or that scancel ends, does not go back.
run_step() {
    local step notices=0 before status code=127
    trap 'notices=$((notices + 1)); kill -USR1 "$step" || true' USR1
    "$@" &
    step=$!
    while true; do
        before=$notices status=0
        wait "$step" || status=$? # a signal ends the wait, not what is waited for
        [ "$status" = 127 ] || code=$status # 127: it had ended, and its code been told, when the signal came
        [ "$notices" != "$before" ] || break
    done
    if [ "$code" = 138 ] || { [ "$notices" -gt 0 ] && [ "$code" != 0 ]; }; then
        echo "interrupted (exit code $code): the job goes back into the queue, where the same command goes on" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
