#!/usr/bin/env bash
# Text: Python's own sources -> a byte-pair model -> what it writes. ROUGH=1 for a minute's look. usage: text.sh [FOLDER]
set -euo pipefail
out=${1:-runs/jobs/text}
mkdir -p "$out"
sources=$(python -c 'import os; print(os.path.dirname(os.__file__))')
protomamba prepare "$sources"/a*.py "$sources"/c*.py --out-dir "$out/data" --train-bpe 1024
protomamba train "$out/data" --out-dir "$out/run" --resume auto ${ROUGH:+--steps 20 --d-model 32 --seq-len 64}
protomamba eval "$out/run/best.safetensors" --batches 4
protomamba generate "$out/run/best.safetensors" --prompt "def " --max-tokens 40
