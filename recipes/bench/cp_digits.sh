#!/usr/bin/env bash
# A learngene fitted to an existing model (`condense --from`) against factorised pre-training on the bundled digits: one
# dense ancestor of depth 6, targets of depth 3. With one seed of the targets about 20 minutes on two cores and 30 on one
# (JOBS=1); interrupted, it goes on where it was. Prints a Markdown table.
#
# usage: bash recipes/bench/cp_digits.sh
# FINECTL_WORKSPACE says where the models go; SEEDS (default "0") and DEPTHS (default "3") which targets, and JOBS
# (default 2) how many processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/cp-digits} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python "$here/cp_digits.py" --jobs "${JOBS:-2}" --seeds ${SEEDS:-0} --depths ${DEPTHS:-3}
