#!/usr/bin/env bash
# Time a full training step of finectl's DiT beside facebookresearch/DiT and diffusers, and the factorised layers
# beside dense ones. Uses the active `python`, which must be able to import finectl; works from any directory.
#
#   recipes/bench/step.sh [--peer-dit PATH] [--models dit-s,dit-b] [--rounds N] [--only steps|layers]
#     [--contestants 'as shipped,finectl'] [--json FILE]
#
# All contestants of a model are in memory at once: more than 24 GB for dit-b; --contestants chooses some.
#
# The first peer is a checkout of https://github.com/facebookresearch/DiT (CC-BY-NC 4.0: run it, do not copy it),
# and needs timm:
#   git clone https://github.com/facebookresearch/DiT peer-dit && pip install timm diffusers
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/step.py" "$@"
