#!/usr/bin/env bash
# Measure what reading latents costs: images/s of the loader alone beside a dit-s step, and the memory of training on
# sets of several sizes. Uses the active `python`, which must be able to import finectl; works from any directory, and
# takes about two minutes and 1 GB of temporary disk.
#
#   recipes/bench/loader.sh [--counts 1000,10000,50000] [--side N] [--threads N] [--steps N] [--json FILE]
#
# TMPDIR says where the latents go for the time being.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/loader.py" "$@"
