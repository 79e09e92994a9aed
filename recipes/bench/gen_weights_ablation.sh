#!/usr/bin/env bash
# Block size and grouping of the weights, as in tables 2 and 3 of Denoised Neural Weights, measured on one concept.
#
#   recipes/bench/gen_weights_ablation.sh [CONCEPT] [--steps N] [--quick]
#
# A small base and the low-rank weights of six edits are trained on the bundled photographs, then a generator of weights
# for each block size and grouping rule, without principal components, as the paper has it. CONCEPT (sepia-pencil) is one
# of the six, since the paper overfits too; but it trains on one alone, which here would leave nothing to learn: the mean
# of the weights is taken out. --steps: updates of each generator (400). --quick: a few, to see that it runs.
# The table goes to stdout; what was made before is found again. Uses the active `python`; minutes on a core.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$here/../../artifacts} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec "${PYTHON:-python}" "$here/gen_weights_ablation.py" "$@"
