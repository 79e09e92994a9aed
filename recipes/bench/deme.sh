#!/usr/bin/env bash
# DeMe against what it is compared with, on bundled data: theta_0, training that goes on for as many updates as all experts
# together, loss weightings, ANT's task weightings, each expert, their ensemble, and merged models by three searches.
#
# usage: bash recipes/bench/deme.sh
# All of these are optional:
#   MODEL=dit-nano DEPTH=4 DATA=digits    or MODEL=unet-nano DATA=photos METRICS=loss
#   PRETRAIN=3000     updates of theta_0, at a rate that falls to 0 along a cosine
#   EACH=400          updates of one expert; everything else gets RANGES times as many
#   RANGES=4 P=0.4    timestep ranges, and the share of draws from all timesteps
#   LR=5e-4 BATCH=64 SEEDS="0 1 2"
#   SAMPLES=500       images a candidate; the final table is of TABLE_SAMPLES=2000
#   ONLY=             rows to make, such as "theta_0 continued merged"; all by default
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-deme} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
model=${MODEL:-dit-nano} data=${DATA:-digits} pretrain=${PRETRAIN:-3000} each=${EACH:-400} ranges=${RANGES:-4}
all=$((each * ranges))
repeated() { printf "$1%.0s" $(seq "$ranges") | sed 's/,$//'; }
tune=(--data "$data" --batch-size "${BATCH:-64}" --lr "${LR:-5e-4}" --ema-power 0.75 --quiet)
depth=()
case $model in dit-*) depth=(--depth "${DEPTH:-4}") ;; esac

wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }

for seed in ${SEEDS:-0 1 2}; do
    echo "## seed $seed" >&2
    theta=$(finectl init --method he --model "$model" "${depth[@]}" --data "$data" --seed "$seed" --quiet |
        finectl train - --data "$data" --steps "$pretrain" --batch-size "${BATCH:-64}" --lr 2e-3 --lr-schedule cosine --seed "$seed" --quiet)
    rows=("$theta") names=("theta_0")
    add() { # NAME COMMAND...: one more row
        local name=$1
        shift
        wanted "$name" || return 0
        rows+=("$("$@")")
        names+=("$name")
        echo "$name done" >&2
    }
    add continued finectl train "$theta" --steps "$all" "${tune[@]}" --seed "$seed"
    for weighting in snr+1 trunc-snr min-snr p2; do
        add "$weighting" finectl train "$theta" --steps "$all" --weighting "$weighting" --normalise-weights "${tune[@]}" --seed "$seed"
    done
    for mtl in ant-uw ant-nash; do
        add "$mtl" finectl train "$theta" --steps "$all" --mtl "$mtl" --clusters "$ranges" "${tune[@]}" --seed "$seed"
    done
    experts=$(finectl finetune-ranges "$theta" --ranges "$ranges" --p "${P:-0.4}" --steps "$each" "${tune[@]}" --seed "$seed")
    add ensemble echo "$experts"
    search=(--search-samples "${SAMPLES:-500}" --sampling-steps 20 --seed "$seed" --quiet)
    add merged finectl merge "$experts" --search surrogate "${search[@]}"
    add merged-coarse finectl merge "$experts" --search coarse-to-fine "${search[@]}"
    add equal-shares finectl merge "$experts" --weights "$(repeated "$(awk "BEGIN {print 1 / $ranges}"),")" --quiet
    add sum finectl merge "$experts" --weights "$(repeated 1,)" --quiet
    printf '%s\n' "rows: ${names[*]}" >&2
    metrics=(--metrics "${METRICS:-loss,frechet,accuracy}" --samples "${TABLE_SAMPLES:-2000}" --sampling-steps 20 --ranges "$ranges" --seed 1000)
    finectl evaluate "${rows[@]}" "${metrics[@]}" --format md --quiet
done
