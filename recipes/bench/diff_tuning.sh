#!/usr/bin/env bash
# Diff-Tuning against plain fine-tuning, on bundled data: a model of half of the digits' classes is fine-tuned on few images
# of the other half. Both modes of the coefficients, the bank and the teacher, each parameter-efficient method with and
# without it, and the ablations, all at equal updates. Of each row: the Fréchet distance and the loss on the target, the loss
# on the source (what was forgotten), and the EWC distance.
#
# usage: bash recipes/bench/diff_tuning.sh
# All of these are optional:
#   PARTS="main peft ablation retention bank power shots"   what to measure
#   MODEL=dit-nano DEPTH=2 SOURCE=digits#0,1,2,3,4 TARGET=digits#5,6,7,8,9
#                     or SOURCE=photos#astronaut,cat,coffee,galaxies TARGET=photos#motorcycle,retina,rocket,tissue IMAGE_SIZE=16
#                     METRICS=loss: no features that tell photographs apart are bundled
#   PRETRAIN=10000 PRETRAIN_LR=2e-3   updates of the pre-trained model, at a rate that falls to 0 along a cosine
#   SHOTS=2           target images a class
#   STEPS=2000 LR=1e-3 BATCH=64       fine-tuning, and KEEP=250,500,1000 the updates that are measured on the way
#   BANK=1000         images of the knowledge bank
#   METHODS="lora difffit bitfit adaptformer vpt"   of the part peft, FEW_LR=3e-3 their rate
#   COUNTS="5 20 100"  images a class of the part shots
#   SEEDS="0 1 2"     seeds of everything, the pre-trained model and the choice of the shots included
#   SAMPLES=2000 SAMPLING=20          images a row, and steps of DDIM
#   RESULTS=DIR       where tables go, by default beside the models
# FINECTL_WORKSPACE says where the models go. Interrupted, it goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../setup.sh" plots,peft
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(cd "$here/../.." && pwd)/artifacts/bench-diff-tuning} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
model=${MODEL:-dit-nano} source=${SOURCE:-digits#0,1,2,3,4} target=${TARGET:-digits#5,6,7,8,9} steps=${STEPS:-2000}
results=${RESULTS:-$FINECTL_WORKSPACE/results}
tune=(--batch-size "${BATCH:-64}" --ema-power 0.75 --eval-every 0 --quiet)

begin() { rows=() names=(); }
row() { # NAME COMMAND...: one more row
    names+=("$1")
    rows+=("$("${@:2}")")
    echo "$part, seed $seed: $1" >&2
}
finetune() { # OPTIONS...: the pre-trained model on the target
    finectl finetune "$theta" --data "$target" --shots "${SHOTS:-2}" --steps "$steps" --lr "${LR:-1e-3}" "${tune[@]}" --seed "$seed" "$@"
}
full() { finetune --method full "$@"; }
chain() { finetune --method diff-tuning --bank "$bank" "$@"; }
teacher() { finetune --method diff-tuning --retention kd "$@"; }
make_bank() { # SAMPLES STEPS
    finectl bank "$theta" --samples "$1" --sampling-steps "$2" --seed "$seed" --quiet
}
measure() { # on the target, with the same noise for all, and on the source; then the distance of the weights
    local told=(--metrics "${METRICS:-loss,frechet,accuracy}" --samples "${SAMPLES:-2000}" --sampling-steps "${SAMPLING:-20}" --seed 1000 --quiet)
    local on_target on_source on_the_way=- kept=() moved=()
    on_target=$(finectl evaluate "${rows[@]}" --data "$target" "${told[@]}")
    on_source=$(finectl evaluate "${rows[@]}" --data "$source" --metrics loss --quiet)
    for path in "${rows[@]}"; do
        if [ -d "$path/checkpoints" ]; then kept+=("$path"); fi
    done
    if [ "${#kept[@]}" != 0 ]; then
        on_the_way=$(finectl evaluate "${kept[@]}" --data "$target" "${told[@]}" --steps-every 1)
    fi
    for path in "${rows[@]}"; do
        moved+=("$(finectl analyse forgetting "$path" --pretrained "$theta" --source-data "$source" --only ewc --quiet)")
    done
    python "$here/diff_tuning_report.py" keep "$results/$part-$seed.json" "$on_target" "$on_source" "$on_the_way" "${moved[@]}" -- "${names[@]}"
}

main() {
    local kept=(${keep:+--keep-at "$keep"})
    row full full "${kept[@]}"
    row "Diff-Tuning" chain "${kept[@]}"
    row "Diff-Tuning, retention 0.5" chain --retention-weight 0.5 "${kept[@]}"
    row "Diff-Tuning, loss weights" chain --coefficients weights
    row "Diff-Tuning, teacher" teacher
    row "Diff-Tuning, teacher, retention 0.5" teacher --retention-weight 0.5
    row "Diff-Tuning, teacher, loss weights" teacher --coefficients weights
}
peft() { # a rate of its own for each method is its default scale of --lr's
    for method in ${METHODS:-lora difffit bitfit adaptformer vpt}; do
        row "$method" full --peft "$method" "${few[@]}"
        row "$method, Diff-Tuning" chain --peft "$method" --retention-weight 0.5 "${few[@]}"
    done
}
ablation() { # with the retention weight at which it does most
    row "neither" full
    row "retention alone" chain --power 0 --retention-power 1 --retention-weight 0.5
    row "retention alone, at all timesteps" chain --power 0 --retention-weight 0.5
    row "reconsolidation alone" finetune --method diff-tuning --retention none
    row "both" chain --retention-weight 0.5
}
retention() { # the released weight, that of images alone (12 to 52), the best of those tried before, and the paper's
    row full full
    for weight in 0.1 0.23 0.5 1; do row "retention weight $weight" chain --retention-weight "$weight"; done
}
bank() {
    row full full
    for count in 50 250 1000; do row "$count images" finetune --method diff-tuning --retention-weight 0.5 --bank "$(make_bank "$count" 50)"; done
    for length in 5 20; do row "1000 images of $length steps" finetune --method diff-tuning --retention-weight 0.5 --bank "$(make_bank 1000 "$length")"; done
}
power() {
    row full full
    for exponent in 0 0.3 0.5 1 1.5; do row "exponent $exponent" chain --power "$exponent" --retention-power 1 --retention-weight 0.5; done
}
shots() {
    for count in ${COUNTS:-5 20 100}; do
        SHOTS=$count row "$count images a class, full" full
        SHOTS=$count row "$count images a class, Diff-Tuning" chain --retention-weight 0.5
    done
}

size=(${IMAGE_SIZE:+--image-size "$IMAGE_SIZE"})
keep=${KEEP-250,500,1000} few=(--lr "${FEW_LR:-3e-3}")
for seed in ${SEEDS:-0 1 2}; do
    theta=$(finectl init --method he --model "$model" --depth "${DEPTH:-2}" --data "$source" "${size[@]}" --seed "$seed" --quiet |
        finectl train - --data "$source" --steps "${PRETRAIN:-10000}" --batch-size 64 --lr "${PRETRAIN_LR:-2e-3}" \
            --lr-schedule cosine --seed "$seed" --eval-every 2000 --quiet)
    bank=$(make_bank "${BANK:-1000}" 50)
    for part in ${PARTS:-main peft ablation retention bank power shots}; do
        begin
        "$part"
        measure
    done
done
python "$here/diff_tuning_report.py" show "$results"
