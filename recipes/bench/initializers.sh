#!/usr/bin/env bash
# Every initialisation method on the bundled digits: a dense ancestor and condensed models with equal budgets, targets of
# several depths that all have the same total of updates (tuning counted), with held-out loss, Fréchet distance and
# accuracy on the way, parameters transferred, and the cost of making several models. Writes results.json, tables.md and
# plots. Interrupted, it goes on where it was; a method more costs only its own models.
#
# usage: bash recipes/bench/initializers.sh [FOLDER]        FOLDER: for the results, default artifacts/bench-initializers
# All of these are optional:
#   TASK=same            transfer: ancestor and condensed models learn the photos, targets the digits
#   DEPTHS="2 4 6 8"     of the targets; the ancestor has 6 layers
#   SEEDS="0 1 2"
#   BUDGET=1500          updates of the ancestor, of each condensed model and of the directly trained models
#   UPDATES=1000         updates of each target in all; STEPS="0 30 100 300 1000" are measured
#   TUNING=30            updates of methods that tune before training
#   BATCH=128            images an update
#   METHODS=             only these methods or rows of the table, separated by commas, such as "fine,weight-selection even"
#   SAMPLES=500 SAMPLING_STEPS=20 DRAWS=10    how they are measured
#   SOURCE_SIZE=8        side of the photos in pixels
#   JOBS=2               targets made side by side, a thread each
# FINECTL_WORKSPACE says where the models go.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
out=${1:-$here/../../artifacts/bench-initializers}/${TASK:-same}
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-initializers/models}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
updates=${UPDATES:-1000}
python "$here/initializers_run.py" --out "$out" --jobs "${JOBS:-2}" --task "${TASK:-same}" \
    --depths "${DEPTHS:-2 4 6 8}" --seeds "${SEEDS:-0 1 2}" --budget "${BUDGET:-1500}" --updates "$updates" \
    --steps "${STEPS:-0 30 100 300 1000}" --tuning "${TUNING:-30}" --batch-size "${BATCH:-128}" --methods "${METHODS:-}" \
    --samples "${SAMPLES:-500}" --sampling-steps "${SAMPLING_STEPS:-20}" --draws "${DRAWS:-10}" \
    --rate "${RATE:-4e-3}" --source-size "${SOURCE_SIZE:-8}"
python "$here/initializers_report.py" "$out/results.json" --out "$out"
