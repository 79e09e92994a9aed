#!/usr/bin/env bash
# One command from a fresh clone: condense a small diffusion model of handwritten digits, build two depths from its
# learngene, train each beside the usual initialisation for the same number of updates, and compare them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" plots
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(dirname "$here")/artifacts} HF_HUB_OFFLINE=1
recipe=$here/quickstart.yaml
# One thread a process, and two models at a time: matrices this small gain little from a second thread, and lose much to it
# where other work runs on the machine.
export OMP_NUM_THREADS=1
total=400 tuning=50 # updates of every model; FINE spends some of them on tuning sigma

target() { # METHOD DEPTH UPDATES
    finectl init "$learngene" --recipe "$recipe" --method "$1" --depth "$2" --quiet |
        finectl train - --recipe "$recipe" --steps "$3" --quiet
}

echo "1. condense: one model whose layers share their factors; extract: its learngene" >&2
learngene=$(finectl condense --recipe "$recipe" | finectl extract - --depths 2,4,6,8)

echo "2. init and train: depths 2 and 6, from the learngene and from scratch, $total updates each" >&2
models=()
for depth in 2 6; do
    fine=$(mktemp)
    target fine $depth $((total - tuning)) >"$fine" &
    scratch=$(target he $depth $total)
    wait $!
    models+=("$(cat "$fine")" "$scratch")
    rm "$fine"
    echo "   depth $depth is trained" >&2
done

echo "3. evaluate: held-out loss, Frechet distance and accuracy of all four" >&2
evaluation=$(finectl evaluate "${models[@]}" --recipe "$recipe" --quiet)
echo
cat "$evaluation/table.md"
echo
echo "convergence: $evaluation/plots/convergence.png"
echo "samples:     $evaluation/samples.png (rows in the table's order, the same noise)"
