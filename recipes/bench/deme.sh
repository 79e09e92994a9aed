#!/usr/bin/env bash
# DeMe against what it is compared with, on bundled data: theta_0, trained until its held-out loss stays where it is;
# training that goes on for as many updates as all experts together, loss weightings, ANT's task weightings; the experts'
# ensemble, and merged models. Then the ablation of the three techniques, the number of ranges, p, and the searches.
#
# usage: bash recipes/bench/deme.sh
# All of these are optional:
#   PARTS="main ablation ranges p search"   what to measure
#   MODEL=dit-nano DEPTH=1 DATA=digits       or MODEL=unet-nano DATA=photos METRICS=loss
#   PRETRAIN=24000 PRETRAIN_LR=2e-3   updates of theta_0, at a rate that falls to 0 along a cosine
#   TOTAL=2000        updates of all experts together, and of everything that they are compared with
#   RANGES=4 P=0.4    timestep ranges, and the share of draws from all timesteps
#   LR=1e-3 BATCH=64 SEEDS="0 1 2"
#   SAMPLES=1000      images a candidate; the final table is of TABLE_SAMPLES=5000, both by SAMPLING=10 steps of DDIM
#   RESULTS=DIR       where tables go, by default beside the models
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-deme} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
model=${MODEL:-dit-nano} data=${DATA:-digits} total=${TOTAL:-2000} ranges=${RANGES:-4} p=${P:-0.4}
results=${RESULTS:-$FINECTL_WORKSPACE/results}
depth=()
case $model in dit-*) depth=(--depth "${DEPTH:-1}") ;; esac
tune=(--data "$data" --batch-size "${BATCH:-64}" --lr "${LR:-1e-3}" --ema-power 0.75 --quiet)

begin() { rows=() names=(); }
row() { # NAME COMMAND...: one more row
    names+=("$1")
    rows+=("$("${@:2}")")
    echo "$part, seed $seed: $1" >&2
}
experts() { # RANGES P OPTIONS...: experts whose updates are $total together
    finectl finetune-ranges "$theta" --ranges "$1" --p "$2" --steps $((total / $1)) "${tune[@]}" --seed "$seed" "${@:3}"
}
merged() { # EXPERTS OPTIONS...
    finectl merge "$1" --search surrogate --search-samples "${SAMPLES:-1000}" --sampling-steps "${SAMPLING:-10}" --seed "$seed" --quiet "${@:2}"
}
shares() { # COUNT WEIGHT: the same weight for all
    printf "$2%.0s," $(seq "$1") | sed 's/,$//'
}
finish() { # measure the rows with the same noise, and keep the figures under the part's name
    local metrics=(--metrics "${METRICS:-loss,frechet,accuracy}" --samples "${TABLE_SAMPLES:-5000}" --sampling-steps "${SAMPLING:-10}" --ranges 4 --seed 1000)
    python "$here/deme_report.py" keep "$(finectl evaluate "${rows[@]}" "${metrics[@]}" --quiet)" "$results/$part-$seed.json" "${names[@]}"
}

main() {
    row theta_0 echo "$theta"
    row continued finectl train "$theta" --steps "$total" "${tune[@]}" --seed "$seed"
    for weighting in snr+1 trunc-snr min-snr p2; do
        row "$weighting" finectl train "$theta" --steps "$total" --weighting "$weighting" --normalise-weights "${tune[@]}" --seed "$seed"
    done
    for mtl in ant-uw ant-nash; do
        row "$mtl" finectl train "$theta" --steps "$total" --mtl "$mtl" --clusters "$ranges" "${tune[@]}" --seed "$seed"
    done
    row ensemble experts "$ranges" "$p"
    local all=${rows[-1]}
    row merged merged "$all"
    row "equal shares" finectl merge "$all" --weights "$(shares "$ranges" "$(awk "BEGIN {print 1 / $ranges}")")" --quiet
    row sum finectl merge "$all" --weights "$(shares "$ranges" 1)" --quiet
}
ablation() { # probabilistic sampling (PS), consistency loss (CL), channel-wise projection (CP)
    row "N = 1" merged "$(experts 1 0 --consistency 0 --projection none)"
    row "N = 1, CP" merged "$(experts 1 0 --consistency 0)"
    row "N = $ranges, PS" merged "$(experts "$ranges" "$p" --consistency 0 --projection none)"
    row "N = $ranges, PS, CL" merged "$(experts "$ranges" "$p" --projection none)"
    row "N = $ranges, PS, CL, CP" merged "$(experts "$ranges" "$p")"
}
ranges() {
    for count in 1 2 4 8; do row "N = $count" merged "$(experts "$count" "$p")"; done
}
p() {
    for share in 0 0.2 0.4 0.7 1; do row "p = $share" merged "$(experts "$ranges" "$share")"; done
}
search() { # what each search finds: the exhaustive grid for 2 and 3 ranges, coarse to fine for 4
    for count in 2 3; do
        local all
        all=$(experts "$count" "$p")
        row "N = $count, grid" merged "$all" --search grid
        row "N = $count, surrogate" merged "$all"
    done
    all=$(experts 4 "$p")
    row "N = 4, coarse-to-fine" merged "$all" --search coarse-to-fine
    row "N = 4, surrogate" merged "$all"
}

for seed in ${SEEDS:-0 1 2}; do
    theta=$(finectl init --method he --model "$model" "${depth[@]}" --data "$data" --seed "$seed" --quiet |
        finectl train - --data "$data" --steps "${PRETRAIN:-24000}" --batch-size "${BATCH:-64}" --lr "${PRETRAIN_LR:-2e-3}" \
            --lr-schedule cosine --seed "$seed" --quiet)
    for part in ${PARTS:-main ablation ranges p search}; do
        begin
        "$part"
        finish
    done
done
python "$here/deme_report.py" draw "$results" "$results/deme.png"
python "$here/deme_report.py" show "$results"
