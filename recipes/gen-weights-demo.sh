#!/usr/bin/env bash
# Weights from words, on the bundled photographs: 60 edits, each a low-rank fine-tuning of one small generator; a
# diffusion model learns to make such weights from the edits' names; and 12 combinations of words that it has not seen,
# with 3 words that it cannot know, show what its weights are worth as a start.
#
#   recipes/gen-weights-demo.sh         the demonstration (gen-weights-demo.yaml)
#   recipes/gen-weights-demo.sh ci      8 edits and a few updates, which show that it runs and nothing else
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" plots,photos,vision
export FINECTL_WORKSPACE=${FINECTL_WORKSPACE:-$(dirname "$here")/artifacts} HF_HUB_OFFLINE=1
# Networks this small gain nothing from a second thread; concepts and runs are shared by processes instead.
export OMP_NUM_THREADS=1
recipe=$here/gen-weights-demo.yaml concepts=demo prompt="soft blur in warm orange light"
if [ "${1:-}" = ci ]; then
    recipe=$recipe:ci concepts=$here/gen-weights-ci.jsonl
fi

echo "1. prompts and pairs: photographs before and after each edit" >&2
pairs=$(finectl gen-weights prompts --set "$concepts" --quiet | finectl gen-weights pairs - --recipe "$recipe")
echo "2. base: one generator of edited images, on the simplest edits" >&2
base=$(finectl gen-weights base "$pairs" --recipe "$recipe")
echo "3. collect: low-rank weights of every edit, from one start" >&2
weights=$(finectl gen-weights collect "$base" --pairs "$pairs" --recipe "$recipe")
echo "4. train: the diffusion model of these weights" >&2
generator=$(finectl gen-weights train "$weights" --recipe "$recipe")
echo "5. predict: weights for a text, in one denoising step: $prompt" >&2
finectl gen-weights predict "$prompt" "$generator" --recipe "$recipe" >/dev/null
echo "6. report: edits that were held out, fine-tuned from the prediction and from every other start" >&2
report=$(finectl gen-weights report "$generator" --recipe "$recipe" --quiet)
echo
cat "$report/table.md"
echo
echo "curves:   $report/plots"
echo "pictures: $report/samples (source, target, and what each start makes at first and after some updates)"
