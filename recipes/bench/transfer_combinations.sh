#!/usr/bin/env bash
# Where the systems meet, on bundled data: what else moves a model to another domain, beside fine-tuning all of it. A model
# of half of the digits' classes goes to the other half, each row by its own chain of commands:
#   full, Diff-Tuning          the two rows that the others are read against
#   smaller, learngene         condense --from | extract | init --depth | finetune: a shallower model, from the model's FINE
#                              learngene; and beside it, untrained, "smaller, from nothing" (init --method he | finetune)
#   experts, one model         finetune-ranges --method diff-tuning | merge --weights 1,..: timestep experts with retention
#   high noise alone           the same experts merged with weight 0 at low noise, where the model stays what it was
#   high noise, DeMe           that of plain experts: what the retention of the experts adds to the zero
#   handed over                the full model makes the first steps, the pre-trained one the last tenth (sample --handover)
# Of each row: parameters, Fréchet distance, accuracy and held-out loss on the new classes, the same noise for all.
#
# usage: bash recipes/bench/transfer_combinations.sh
# All of these are optional:
#   MODEL=dit-nano DEPTH=4 SMALLER=2 SOURCE=digits#0,1,2,3,4 TARGET=digits#5,6,7,8,9
#   PRETRAIN=2000 STEPS=400 BATCH=64 SEED=0    updates of the model, of each fine-tuning and of each expert
#   CONDENSE=600      updates of the learngene's fit
#   BANK=500          images of the knowledge bank
#   SAMPLES=1000      images a row
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was; the table is printed at the end.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-combinations} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
source=${SOURCE:-digits#0,1,2,3,4} target=${TARGET:-digits#5,6,7,8,9} seed=${SEED:-0} steps=${STEPS:-400} batch=${BATCH:-64}
tune=(--data "$target" --steps "$steps" --batch-size "$batch" --seed "$seed" --eval-every 0 --quiet)
ranged=(--ranges 4 --projection none --lr 5e-4 "${tune[@]}")
sampled=(--samples "${SAMPLES:-1000}" --seed 1000 --quiet)
say() { echo "$*" >&2; }

say "pre-training on $source"
theta=$(finectl init --method he --model "${MODEL:-dit-nano}" --depth "${DEPTH:-4}" --data "$source" --seed "$seed" --quiet |
    finectl train - --steps "${PRETRAIN:-2000}" --batch-size "$batch" --seed "$seed" --eval-every 0 --quiet)
bank=$(finectl bank "$theta" --samples "${BANK:-500}" --seed "$seed" --quiet)

say "the whole model: full, Diff-Tuning"
full=$(finectl finetune "$theta" --method full "${tune[@]}")
chain=$(finectl finetune "$theta" --method diff-tuning --bank "$bank" "${tune[@]}")

say "a smaller model: from the learngene, and from nothing"
smaller=$(finectl condense --from "$theta" --data "$source" --steps "${CONDENSE:-600}" --batch-size "$batch" --seed "$seed" --eval-every 0 --quiet |
    finectl extract - --quiet |
    finectl init - --depth "${SMALLER:-2}" --data "$target" --seed "$seed" --quiet |
    finectl finetune - --method full "${tune[@]}")
nothing=$(finectl init --method he --model "${MODEL:-dit-nano}" --depth "${SMALLER:-2}" --data "$target" --seed "$seed" --quiet |
    finectl finetune - --method full "${tune[@]}")

say "timestep experts, put together"
retaining=$(finectl finetune-ranges "$theta" --method diff-tuning --bank "$bank" "${ranged[@]}")
plain=$(finectl finetune-ranges "$theta" --p 0.4 "${ranged[@]}")
merged=$(finectl merge "$retaining" --weights 0.25,0.25,0.25,0.25 --quiet)
high=$(finectl merge "$retaining" --weights 0,0,0.5,0.5 --quiet)
high_plain=$(finectl merge "$plain" --weights 0,0,0.5,0.5 --quiet)

say "handed over"
handed=$(finectl sample "$full" --handover "$theta" --fraction 0.1 "${sampled[@]}")

say "full | Diff-Tuning | smaller, learngene | smaller, from nothing | experts, one model | high noise alone | high noise, DeMe | handed over"
finectl evaluate "$full" "$chain" "$smaller" "$nothing" "$merged" "$high" "$high_plain" "$handed" --data "$target" \
    --metrics loss,frechet,accuracy --samples "${SAMPLES:-1000}" --seed 1000
