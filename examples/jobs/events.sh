#!/usr/bin/env bash
# Events: who took which item when -> the next item of everybody. ROUGH=1 for a minute's look. usage: events.sh [FOLDER]
set -euo pipefail
out=${1:-runs/jobs/events}
mkdir -p "$out"
python - "$out/clicks.csv" "${ROUGH:+200}" <<'PY'
import random, sys

# Items in circles of ten: most people go on to the next one of their circle, some jump.
random.seed(0)
with open(sys.argv[1], "w") as file:
    print("user,time,item", file=file)
    for user in range(int(sys.argv[2] or 4000)):
        circle, at = random.randrange(30), random.randrange(10)
        for time in range(random.randrange(4, 20)):
            print(f"u{user},{time},i{circle}-{at}", file=file)
            circle, at = (circle, (at + 1) % 10) if random.random() < 0.8 else (random.randrange(30), random.randrange(10))
PY
protomamba prepare events "$out/clicks.csv" --out-dir "$out/data" --group user --order time --item item
protomamba train "$out/data" --out-dir "$out/run" --resume auto ${ROUGH:+--steps 20 --d-model 32}
protomamba eval "$out/run/best.safetensors" --split test
protomamba predict "$out/run/best.safetensors" "$out/clicks.csv" --out "$out/next.jsonl" --top-k 3 --exclude-seen 1
head -3 "$out/next.jsonl"
