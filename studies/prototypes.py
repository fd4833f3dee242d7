"""Heads side by side on the standard library's sources: the table and the picture of docs/prototypes.md.

    python studies/prototypes.py                                                # everything; hours
    python studies/prototypes.py --vocabularies 257 --steps 1500 --seeds 0      # a part of it

Trains each head with each seed, on bytes (257 with the end of file) and on byte pairs learned on the training part
(4096, 16384). A run that is finished is not trained again. What a step costs is measured before, with the heads taking
turns on one thread, and a run's clock is its steps times that; the last variant gives learned prototypes the time that
the softmax head takes. Bits a token are compared with a temperature fitted for each head on every second held-out
window and judged, as accuracy is, on the others. Needs the extras `tokenizers` and `plots`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import PLAIN, UPDATES, Session, costs, new_figure, write_between_marks
from torch import Tensor

from protomamba.data.corpus import stdlib_sources
from protomamba.run_config import RunConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed": {"head": "hpn", "prototypes": "fixed"},
    "learned": {"head": "hpn", "prototypes": "learned"},
    "softmax": {"head": "softmax"},
}
EQUAL_TIME = "learned, softmax's time"
# Mamba layers of width 128 on 8 x 256 tokens a step.
SHAPE = {"d_model": 128, "base_layers": 2, "target_layers": 2, "freeze": "none", "batch_size": 8, "seq_len": 256}
COST_STEPS, COST_TURNS = 5, 9
POINTS = 6
# Targets that a temperature is fitted on.
FIT_TARGETS = 2_048


@dataclass(frozen=True)
class Result:
    """One run: held-out figures at its end, milliseconds a step, the figures on the way."""

    vocabulary: int
    variant: str
    seed: int
    steps: int
    accuracy: float
    bits: float  # a token, with the temperature fitted
    step_ms: float
    curve: list[tuple[float, float]]  # (seconds of training, accuracy)


def token_files(vocabulary: int, folder: Path) -> tuple[Path, Path]:
    """Training and held-out tokens (every 20th file) as .npy, made once."""
    train, held_out = folder / f"train-{vocabulary}.npy", folder / f"held-out-{vocabulary}.npy"
    if train.is_file() and held_out.is_file():
        return train, held_out
    root = Path(sysconfig.get_path("stdlib"))
    texts = [(root / source).read_text(encoding="utf-8", errors="replace") for source in stdlib_sources(root)]
    parts = {held_out: texts[::20], train: [text for index, text in enumerate(texts) if index % 20]}
    encode = byte_encoder() if vocabulary == 257 else pair_encoder(vocabulary, parts[train])
    folder.mkdir(parents=True, exist_ok=True)
    for path, documents in parts.items():
        tokens = [token for text in documents for token in [*encode(text), vocabulary - 1]]
        np.save(path, np.asarray(tokens, dtype=np.uint16))
    return train, held_out


def byte_encoder() -> Callable[[str], Sequence[int]]:
    return lambda text: text.encode()


def pair_encoder(vocabulary: int, texts: Sequence[str]) -> Callable[[str], Sequence[int]]:
    """Byte-pair tokens 0 to vocabulary - 2, learned on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    level = pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return lambda text: tokenizer.encode(text).ids


def session(vocabulary: int, variant: str, seed: int, out: Path, **more: Any) -> Session:
    """A trainer of that head on its data; `more`: other settings of the run."""
    train, held_out = token_files(vocabulary, out / "tokens")
    fields = {**SHAPE, **UPDATES, **PLAIN, **VARIANTS[variant], "packed_sequences": False, "vocab_size": vocabulary}
    files = {"token_file": train, "val_token_file": held_out, "out_dir": out}
    return Session.start(RunConfig(**{**fields, **files, "seed": seed, **more}))


def step_costs(vocabulary: int, out: Path) -> dict[str, float]:
    """Milliseconds of one thread a step of each head, the heads taking turns; kept beside the runs."""
    kept = out / f"costs-{vocabulary}.json"
    if not kept.is_file():
        sessions = {name: session(vocabulary, name, 0, out) for name in VARIANTS}
        kept.write_text(json.dumps(costs(sessions, COST_STEPS, COST_TURNS)))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


@torch.no_grad()
def judged(trained: Session) -> tuple[float, float]:
    """Accuracy and bits a token over every second held-out window, a temperature being fitted on the others."""
    model = trained.trainer.model.eval()
    pairs = [(model.features(ids, reset_BL=reset)[0], targets) for ids, targets, reset in trained.held_out]
    model.train()
    (z_fit, y_fit), (z_TD, y_T) = (
        (torch.cat([z[y >= 0] for z, y in part]), torch.cat([y[y >= 0] for _, y in part]))
        for part in (pairs[1::2], pairs[::2])
    )
    head = model.head
    chosen = torch.linspace(0, len(y_fit) - 1, min(FIT_TARGETS, len(y_fit))).long()
    temperature = fitted(head.scores(z_fit[chosen]), y_fit[chosen])
    hits, nats = 0, 0.0
    for z_RD, y_R in zip(head.blocks(z_TD), head.blocks(y_T), strict=True):
        scores_RV = head.scores(z_RD)
        hits += int((scores_RV.argmax(-1) == y_R).sum())
        nats += float(F.cross_entropy(temperature * scores_RV, y_R, reduction="sum"))
    return hits / len(y_T), nats / len(y_T) / math.log(2)


def fitted(scores_TV: Tensor, targets_T: Tensor) -> float:
    """The factor on the scores with the least cross entropy, which is convex in it: by ternary search on its log."""
    low, high = math.log(1e-2), math.log(1e3)
    for _ in range(30):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        worse = [float(F.cross_entropy(math.exp(x) * scores_TV, targets_T)) for x in (left, right)]
        low, high = (left, high) if worse[0] > worse[1] else (low, right)
    return math.exp((low + high) / 2)


def run(vocabulary: int, name: str, variant: str, seed: int, steps: int, step_ms: float, out: Path) -> Result:
    """Train `variant` to the end under that name, or read what it left."""
    kept = out / (re.sub("[^a-z0-9]+", "-", f"{vocabulary}-{name}-{seed}-{steps}") + ".json")
    if kept.is_file():
        return Result(**json.loads(kept.read_text()))
    trained = session(vocabulary, variant, seed, out)
    trained.run(steps, step_ms, POINTS)
    accuracy, bits = judged(trained)
    curve = [(point["seconds"], point["accuracy"]) for point in trained.curve[1:]]
    result = Result(vocabulary, name, seed, steps, accuracy, bits, step_ms, curve)
    kept.write_text(json.dumps(asdict(result)))
    print(asdict(result), flush=True)
    return result


def study(vocabulary: int, steps: int, seeds: Sequence[int], names: Sequence[str], out: Path) -> list[Result]:
    """All variants at one vocabulary."""
    out.mkdir(parents=True, exist_ok=True)
    ms = step_costs(vocabulary, out)
    longer = round(steps * ms["softmax"] / ms["learned"])
    wanted = {name: (name, steps) for name in VARIANTS} | {EQUAL_TIME: ("learned", longer)}
    return [
        run(vocabulary, name, wanted[name][0], seed, wanted[name][1], ms[wanted[name][0]], out)
        for name in names
        for seed in seeds
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and how far the furthest is from it where there are several."""
    mean = statistics.fmean(values)
    far = max(abs(value - mean) for value in values)
    return f"{mean:.{digits}f}" + (f" ± {far:.{digits}f}" if len(values) > 1 else "")


def table(results: Sequence[Result]) -> str:
    rows = ["| classes | head | steps | seeds | bits a token | accuracy | step, of softmax's |", "|---" * 7 + "|"]
    ms = {r.vocabulary: r.step_ms for r in results if r.variant == "softmax"}
    for key in dict.fromkeys((r.vocabulary, r.variant, r.steps) for r in results):
        group = [r for r in results if (r.vocabulary, r.variant, r.steps) == key]
        bits, accuracy = spread([r.bits for r in group], 3), spread([r.accuracy for r in group], 4)
        ratio = f"{group[0].step_ms / ms[key[0]]:.2f}" if key[0] in ms else ""
        rows.append(f"| {key[0]:,} | {key[1]} | {key[2]:,} | {len(group)} | {bits} | {accuracy} | {ratio} |")
    return "\n".join(rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """Held-out accuracy over seconds of training, one panel a vocabulary."""
    vocabularies = sorted({r.vocabulary for r in results})
    figure, axes = new_figure("prototypes", len(vocabularies))
    colours = {name: f"C{index}" for index, name in enumerate([*VARIANTS, EQUAL_TIME])}
    for axis, vocabulary in zip(axes[0], vocabularies, strict=True):
        for r in (r for r in results if r.vocabulary == vocabulary and r.seed == results[0].seed):
            axis.plot(*zip(*r.curve, strict=True), label=r.variant, color=colours[r.variant], marker=".")
        axis.set(title=f"{vocabulary:,} classes", xlabel="seconds of training")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][-1].legend(fontsize="small", loc="lower right")  # the panel that has every line
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/prototypes"), help="tokens and results")
    parser.add_argument("--docs-dir", type=Path, help="where prototypes.md and .svg are written; nowhere without")
    parser.add_argument("--vocabularies", default="257,4096,16384", help="classes, comma-separated")
    parser.add_argument("--variants", default=",".join([*VARIANTS, EQUAL_TIME]).replace(EQUAL_TIME, "longer"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=3_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [EQUAL_TIME if name == "longer" else name for name in given.variants.split(",")]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    every = [study(int(v), given.steps, seeds, names, given.out_dir) for v in given.vocabularies.split(",")]
    results = [result for one in every for result in one]
    print(table(results))
    if given.docs_dir:
        write_between_marks(given.docs_dir / "prototypes.md", "python studies/prototypes.py", table(results))
        draw(results, given.docs_dir / "prototypes.svg")


if __name__ == "__main__":
    main()
