#!/usr/bin/env bash
# Every initialisation method on the bundled digits: one dense ancestor and one condensed model with equal budgets, targets
# of some depths, all with the same total of updates (tuning counted), and one table of loss, distance and accuracy.
#
#   recipes/bench/initializers.sh [DEPTHS [UPDATES [SEEDS [ANCESTOR_UPDATES]]]]       default: '2 4 6 8' 300 '0 1 2' 1500
#
# Uses the active `finectl`; artifacts go to $FINECTL_WORKSPACE, and what is there is not made again.
set -euo pipefail
depths=${1:-2 4 6 8} updates=${2:-300} seeds=${3:-0 1 2} budget=${4:-1500}
tuning=50
rate=${ANCESTOR_LR:-4e-3} # that of condense on bundled data: at train's own 1e-3 the ancestor would be the worse trained one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

# METHOD VARIANT KIND TUNES, a line each
methods() {
    finectl ls methods --json | python -c '
import json, sys
for line in map(json.loads, sys.stdin):
    for variant in line["variants"] or ["-"]:
        print(line["method"], variant, line["sources"][0], int("tune_steps" in line["options"]))'
}

models=()
for seed in $seeds; do
    ancestor=$(finectl init --method he --model dit-nano --depth 6 --seed "$seed" --quiet |
        finectl train - --steps "$budget" --lr "$rate" --seed "$seed" --quiet)
    learngene=$(finectl condense --model dit-nano --steps "$budget" --seed "$seed" --quiet | finectl extract - --quiet)
    for depth in $depths; do
        while read -r method variant kind tunes; do
            source=$ancestor
            [ "$kind" = learngene ] && [ "$method" = fine ] && source=$learngene
            options=(--method "$method" --depth "$depth" --seed "$seed")
            [ "$variant" = - ] || options+=(--variant "$variant")
            steps=$updates
            if [ "$tunes" = 1 ]; then
                options+=(--tune-steps "$tuning")
                steps=$((updates - tuning))
            fi
            models+=("$(finectl init "$source" "${options[@]}" --quiet </dev/null |
                finectl train - --steps "$steps" --seed "$seed" --quiet)")
            echo "seed $seed depth $depth: $method $variant" >&2
        done < <(methods)
    done
done
finectl evaluate "${models[@]}" --samples 500 --quiet --format md
