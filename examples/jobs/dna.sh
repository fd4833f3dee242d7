#!/usr/bin/env bash
# DNA: a generated genome with planted motifs -> a model that knows them. ROUGH=1 for a minute's look. usage: dna.sh [FOLDER]
set -euo pipefail
out=${1:-runs/jobs/dna}
mkdir -p "$out"
python - "$out/genome.fa" "${ROUGH:+20000}" <<'PY'
import random, sys

random.seed(0)
motif, size = "TATAAAGGCCTTAGCATCGA", int(sys.argv[2] or 1_000_000)
with open(sys.argv[1], "w") as file:
    for contig in range(8):
        bases = random.choices("ACGT", k=size // 8)
        for at in range(0, len(bases) - 60, 60):
            bases[at : at + len(motif)] = motif
        print(f">contig{contig}", *("".join(bases[i : i + 60]) for i in range(0, len(bases), 60)), sep="\n", file=file)
PY
protomamba prepare fasta "$out/genome.fa" --out-dir "$out/data"
protomamba train "$out/data" --out-dir "$out/run" --resume auto ${ROUGH:+--steps 20 --d-model 32 --seq-len 128}
protomamba eval "$out/run/best.safetensors" --batches 4
protomamba generate "$out/run/best.safetensors" --prompt TATAAAGG --max-tokens 24 --temperature 0
