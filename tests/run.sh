#!/usr/bin/env bash
# The whole test suite, from a fresh clone on: sets up an environment when there is none, then runs pytest.
# Arguments are passed on to pytest: bash tests/run.sh -k merge -x
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../recipes/setup.sh" test
cd "$here/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python -m pytest -n 2 "$@"
