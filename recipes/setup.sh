# Sourced by quickstart.sh, tests/run.sh and the benchmarks: an environment with finectl in it.
#
# usage: . recipes/setup.sh EXTRAS     (such as "plots" or "test")
# Uses the active virtual environment, or makes .venv beside pyproject.toml. Installs only what is not there yet: a stamp
# inside the environment remembers what was installed from which pins. FINECTL_PYTHON names another Python.

finectl_setup() {
    local root extras python environment stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    extras=$1
    python=${FINECTL_PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: finectl needs Python 3.10 or newer; '$python' is not" >&2
        echo "  try:      FINECTL_PYTHON=/path/to/python3.11 bash $0" >&2
        return 2
    fi
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        environment=$VIRTUAL_ENV
    else
        environment=$root/.venv
        if [ ! -x "$environment/bin/python" ]; then
            echo "making $environment" >&2
            "$python" -m venv "$environment" || return
        fi
        export VIRTUAL_ENV=$environment
    fi
    export PATH=$environment/bin:$PATH
    hash -r
    wanted=$(cat "$root/pyproject.toml" "$root/recipes/constraints.txt" | "$environment/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    stamp=$environment/.finectl-$extras
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$root $wanted" ]; then
        echo "installing finectl[$extras] into $environment (a few minutes the first time)" >&2
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$root/recipes/constraints.txt" -e "$root[$extras]" >&2 || return
        echo "$root $wanted" >"$stamp"
    fi
}

finectl_setup "$1" || exit
