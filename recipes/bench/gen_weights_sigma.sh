#!/usr/bin/env bash
# Sigma generated from a task's text (`init --sigma-from`) against interpolated and tuned sigma: held-out tasks, a
# collected depth and one that never was. A learngene of the bundled digits, a collection of tasks, a generator, then
# every start trained for a few updates. Prints a Markdown table, whatever its sign. The defaults take about 6 minutes of
# one core; interrupted, it goes on where it was.
#
# usage: bash recipes/bench/gen_weights_sigma.sh [OPTIONS of gen_weights_sigma.py]
# FINECTL_WORKSPACE says where the artifacts go.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh"
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/gen-weights-sigma} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python "$here/gen_weights_sigma.py" "$@"
