#!/usr/bin/env bash
# FINE against the usual initialisation on the bundled digits: depths 2, 4, 6, 8 from one auxiliary model a seed, three
# seeds; with ablations. About an hour on two cores; interrupted, it goes on where it was. Prints Markdown tables.
#
# usage: bash recipes/bench/fine_digits.sh
# FINECTL_WORKSPACE says where the models go; SEEDS (default "0 1 2"), LONG_SEEDS (of the 3,000 updates from scratch,
# default "0 1 2") and ABLATION_SEEDS (default "0") how many.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/fine-digits} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python "$here/fine_digits.py" --jobs 2 --seeds ${SEEDS:-0 1 2} --long-seeds ${LONG_SEEDS:-0 1 2} \
    --ablation-seeds ${ABLATION_SEEDS:-0}
