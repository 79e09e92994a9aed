#!/usr/bin/env bash
# One data set after another, on bundled data: a model of the digits 0 to 4 learns 5 and 6, then 7, then 8 and 9, from few
# images of each, plainly and by Diff-Tuning, whose bank is retained under no class, or under its own. The Fréchet distance
# on each set right after it was learned, and at the end.
#
# usage: bash recipes/bench/continual.sh
# All of these are optional:
#   MODEL=dit-nano DEPTH=2 SOURCE=digits#0,1,2,3,4 SETS="digits#5,6 digits#7 digits#8,9"
#   PRETRAIN=10000    updates of the pre-trained model, at 2e-3, which falls to 0 along a cosine
#   SHOTS=2           images a class
#   STEPS=1000 LR=1e-3 BATCH=64       fine-tuning on each set
#   SEEDS="0 1 2"     seeds of everything
#   SAMPLES=1000      images a measurement
#   RESULTS=DIR       where tables go, by default beside the models
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-continual} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
source=${SOURCE:-digits#0,1,2,3,4} results=${RESULTS:-$FINECTL_WORKSPACE/results}
read -ra sets <<< "${SETS:-digits#5,6 digits#7 digits#8,9}"
learned=(--data "${sets[0]}")
for set in "${sets[@]:1}"; do learned+=(--then "$set"); done

row() { # NAME OPTIONS...: learn all sets so
    finectl finetune "$theta" "${learned[@]}" --shots "${SHOTS:-2}" --steps "${STEPS:-1000}" --lr "${LR:-1e-3}" \
        --batch-size "${BATCH:-64}" --ema-power 0.75 --eval-every 0 --metrics frechet,accuracy,loss \
        --samples "${SAMPLES:-1000}" --seed "$seed" --json --quiet "${@:2}" |
        python "$here/continual_report.py" keep "$results" "$seed" "$1"
    echo "seed $seed: $1" >&2
}

for seed in ${SEEDS:-0 1 2}; do
    theta=$(finectl init --method he --model "${MODEL:-dit-nano}" --depth "${DEPTH:-2}" --data "$source" --seed "$seed" --quiet |
        finectl train - --data "$source" --steps "${PRETRAIN:-10000}" --batch-size 64 --lr 2e-3 --lr-schedule cosine \
            --seed "$seed" --eval-every 2000 --quiet)
    row "full" --method full
    row "Diff-Tuning" --method diff-tuning
    row "Diff-Tuning, retention 0.5" --method diff-tuning --retention-weight 0.5
    row "Diff-Tuning, loss weights" --method diff-tuning --coefficients weights
    row "Diff-Tuning, own classes" --method diff-tuning --bank-labels own
    row "Diff-Tuning, loss weights, own classes" --method diff-tuning --coefficients weights --bank-labels own
done
python "$here/continual_report.py" show "$results"
