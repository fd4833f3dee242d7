#!/usr/bin/env bash
# Labelled sequences: noisy waves of three kinds -> which kind. ROUGH=1 for a minute's look. usage: labels.sh [FOLDER]
set -euo pipefail
out=${1:-runs/jobs/labels}
mkdir -p "$out"
python - "$out/waves.ts" "${ROUGH:+60}" <<'PY'
import math, random, sys

random.seed(0)
kinds = {"slow": lambda t: math.sin(t / 6), "fast": lambda t: math.sin(t / 2), "square": lambda t: math.copysign(1, math.sin(t / 4))}
with open(sys.argv[1], "w") as file:
    print("@problemName waves\n@timeStamps false\n@univariate true\n@equalLength false\n@classLabel true", *kinds, "\n@data", file=file)
    for series in range(int(sys.argv[2] or 1500)):
        kind, shift = random.choice(list(kinds)), random.uniform(0, 40)
        values = (f"{kinds[kind](time + shift) + random.gauss(0, 0.5):.4f}" for time in range(random.randrange(30, 50)))
        print(",".join(values), kind, sep=":", file=file)
PY
protomamba prepare labels "$out/waves.ts" --out-dir "$out/data"
protomamba train "$out/data" --out-dir "$out/run" --resume auto ${ROUGH:+--steps 20 --d-model 16}
protomamba eval "$out/run/best.safetensors"
protomamba predict "$out/run/best.safetensors" "$out/waves.ts" --out "$out/answers.jsonl"
head -3 "$out/answers.jsonl"
