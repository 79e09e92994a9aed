#!/usr/bin/env bash
# Time merging five checkpoints into one by task arithmetic: finectl beside mergekit and beside what cannot be beaten by
# much, reading the five files and writing one. Uses the active `python`, which must be able to import finectl; works
# from any directory. The checkpoints are synthetic: MB megabytes each (default 500), plus the output's, under TMPDIR.
#
#   recipes/bench/merge.sh [MB] [--rounds N] [--mergekit PATH] [--dtype float32|bfloat16] [--json FILE]
#
# The peer needs torch and much else, so give it an environment of its own:
#   python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
#   recipes/bench/merge.sh --mergekit /tmp/mergekit/bin/mergekit-pytorch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/merge.py" "$@"
