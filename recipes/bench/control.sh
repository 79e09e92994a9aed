#!/usr/bin/env bash
# ControlNets with and without Diff-Tuning, on bundled data: a small UNet of text that knows the digits learns to obey their
# edges. Measured every few updates is how far the edges of what it makes are from those asked for, and the update at which
# it suddenly obeys.
#
# usage: bash recipes/bench/control.sh
# All of these are optional:
#   PRETRAIN=3000     updates of the UNet, at 2e-3, which falls to 0 along a cosine; one for all seeds
#   STEPS=1000 LR=1e-3 BATCH=16       the ControlNet
#   EVERY=25 IMAGES=64 SAMPLING=10    updates between measurements, held-out images of each, and steps of DDIM
#   BANK=500          images of the knowledge bank
#   SEEDS="0 1 2"     seeds of the ControlNets
#   RESULTS=DIR       where tables go, by default beside the models
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots,photos
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-control} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=${RESULTS:-$FINECTL_WORKSPACE/results}

theta=$(finectl init --method he --model unet-text-nano --text-encoder hash --data digits --quiet |
    finectl train - --data digits --steps "${PRETRAIN:-3000}" --batch-size 64 --lr 2e-3 --lr-schedule cosine --ema-power 0.75 \
        --eval-every 1000 --quiet)
bank=$(finectl bank "$theta" --samples "${BANK:-500}" --quiet)
row() { # NAME OPTIONS...: one more ControlNet
    finectl finetune "$theta" --data digits --control edge --control-set sigma=0.7 --steps "${STEPS:-1000}" \
        --batch-size "${BATCH:-16}" --lr "${LR:-1e-3}" --ema 0.98 --eval-every 0 --validate-every "${EVERY:-25}" \
        --validation-images "${IMAGES:-64}" --validation-steps "${SAMPLING:-10}" --seed "$seed" --json --quiet "${@:2}" |
        python "$here/control_report.py" keep "$results" "$seed" "$1"
    echo "seed $seed: $1" >&2
}
for seed in ${SEEDS:-0 1 2}; do
    row "plain" --method full
    row "Diff-Tuning" --method diff-tuning --bank "$bank"
    row "Diff-Tuning, bank without controls" --method diff-tuning --bank "$bank" --bank-control empty
    row "reconsolidation alone" --method diff-tuning --retention none
    row "Diff-Tuning, loss weights" --method diff-tuning --bank "$bank" --coefficients weights
done
python "$here/control_report.py" show "$results"
