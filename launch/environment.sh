# Sourced by the scripts beside it: makes a virtual environment and installs this checkout into it.

# make_environment DIR EXTRA: EXTRA is "" or an extra in brackets. Does nothing when nothing has changed since.
make_environment() {
    local dir=$1 extra=$2 python stamp
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "fldist needs Python 3.11 to 3.13; '$python' is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        return 1
    }
    stamp=$(cat setup.py constraints.txt | cksum | tr ' ' -)$extra
    if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    if [ ! -x "$dir/bin/python" ]; then
        "$python" -m venv "$dir"
    fi
    echo "installing into $dir (the first time takes a few minutes: torch is large)"
    # torch first and by its exact version: asked for by name alone, it may come as another build than pinned
    "$dir/bin/pip" install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    "$dir/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
    echo "$stamp" > "$dir/.installed"
}
