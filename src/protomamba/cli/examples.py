"""The examples that `--help` ends with; a test parses each of them."""

from __future__ import annotations

import textwrap

WIDTH = 80

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "protomamba train data --out-dir runs/mine",
        "protomamba train data --out-dir runs/mine --resume auto",
        "protomamba train data --out-dir runs/mine --time-budget 20m --early-stopping-patience 5",
        "protomamba train --token-file tokens.txt --preset plain --steps 2000 --d-model 256 --base-layers 4",
        "protomamba train data --layers mamba*3,attention --layer-option attention.n_head=4",
        "torchrun --nproc-per-node 2 -m protomamba train data --out-dir runs/mine --grad-shards 2",
    ),
    "eval": (
        "protomamba eval runs/mine/best.safetensors",
        "protomamba eval runs/mine/best.safetensors data --split test --json",
    ),
    "generate": (
        'protomamba generate runs/mine/best.safetensors --prompt "Once" --max-tokens 100',
        "protomamba generate runs/mine/best.safetensors --prompt-tokens 3,4,5 --temperature 0 --json",
    ),
    "predict": (
        "protomamba predict runs/mine/best.safetensors new.csv --out answers.jsonl",
        "protomamba predict runs/mine/best.safetensors users.jsonl --out next.csv --top-k 5 --exclude-seen",
    ),
    "prepare": (
        "protomamba prepare texts/ --out-dir data",
        "protomamba prepare articles.jsonl.gz --field body --train-bpe 4096 --out-dir data",
    ),
    "prepare events": ("protomamba prepare events clicks.csv --group user --order time --item item --out-dir data",),
    "prepare fasta": ("protomamba prepare fasta genome.fa.gz --out-dir data",),
    "prepare labels": (
        "protomamba prepare labels reviews.csv --label stars --text review --out-dir data",
        "protomamba prepare labels series.ts --out-dir data",
    ),
    "inspect": ("protomamba inspect runs/mine/latest.safetensors",),
    "parity": (
        "protomamba parity kernels --random 20",
        "protomamba parity resume data",
    ),
    "export": (
        "protomamba export runs/mine/best.safetensors --out exported",
        "protomamba export runs/mine/best.safetensors --format weights --out weights",
    ),
    "report": ("protomamba report runs/mine runs/other --out comparison.html",),
    "compare": ("protomamba compare runs/mine runs/other",),
    "track": ("protomamba track runs/mine --to tensorboard",),
    "bench": (
        "protomamba bench --shapes S,M --precision fp32,bf16",
        "protomamba bench --op selective_scan,mamba_block",
    ),
}


def epilog(command: str, more: str | None) -> str | None:
    """What comes after the list of flags: a command's own remark, then its examples."""
    lines = [_folded(line) for line in EXAMPLES.get(command, ())]
    examples = "\n".join([f"example{'s' if len(lines) > 1 else ''}:", *lines]) if lines else None
    remark = textwrap.fill(more, WIDTH) if more else None
    return "\n\n".join(part for part in (remark, examples) if part) or None


def _folded(line: str) -> str:
    """A command as it can be pasted, in lines that a terminal does not break."""
    parts = textwrap.wrap(line, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n      ".join(parts)
