"""`protomamba parity jax`: our model and Trainer beside the JAX twin, on one file of parameters and batches.

The twin runs in a process of its own and sees nothing of ours but that file. In float32 our side is what training uses,
native kernels included; in float64 it is the reference path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from protomamba.config import ModelConfig, TrainConfig
from protomamba.errors import UserError
from protomamba.kernels.closeness import rms_ratio
from protomamba.model.sequence_model import SequenceModel
from protomamba.parity.report import Report, max_abs, merge, missing, versions
from protomamba.train.optim import decays
from protomamba.train.trainer import Trainer

Arrays = dict[str, np.ndarray]
STEPS, BATCH, LENGTH = 3, 3, 70  # a length that is no multiple of any chunk
HEADS: dict[str, dict[str, Any]] = {
    "hpn": {"head": "hpn"},
    "hpn, no separation": {"head": "hpn", "separation": 0.0},
    "softmax": {"head": "softmax"},
    "tied": {"head": "softmax", "tie_embedding": True},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 23,
    "d_model": 24,
    "n_layer": 2,
    "d_state": 5,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": 3,
}
# Clipping, both betas and epsilon bite within three steps; the rate is constant, and high enough for an update to stand
# out from the rounding of the float32 parameter it is added to.
TRAINING = TrainConfig(
    steps=STEPS,
    lr=1e-2,
    lr_min_scale=1.0,
    weight_decay=0.1,
    beta2=0.95,
    adam_eps=1e-6,
    grad_clip_norm=0.05,
    ff_lr=0.0,
    bp_cadence_steps=1,
)


class Tolerance(NamedTuple):
    """`absolute` of losses and scores; `relative` of gradients and updates, as rms_ratio of each parameter."""

    absolute: float
    relative: float


TOLERANCES = {"float32": Tolerance(5e-5, 1e-4), "float64": Tolerance(1e-9, 1e-9)}


def run_all(seed: int = 0, folder: Path | None = None) -> Report:
    """Every layer with every head in both precisions, as one report."""
    cases = product(TOLERANCES, ("mamba", "compact"), HEADS)
    report = merge("JAX", (run(seed, dtype, layer, head, folder) for dtype, layer, head in cases))
    report.facts |= {"steps": str(STEPS), "seed": str(seed)}
    return report


def run(
    seed: int = 0, dtype: str = "float32", layer: str = "mamba", head: str = "hpn", folder: Path | None = None
) -> Report:
    """Loss, every gradient and three clipped AdamW updates of one kind of model, ours against JAX's.

    head: one of HEADS. folder: where the shared inputs and both sides' outputs are kept (.npz); None = nowhere.
    Raises UserError where jax cannot be imported or fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(folder or scratch)
        kept.mkdir(parents=True, exist_ok=True)
        stem = re.sub("[^a-z0-9]+", "-", f"{layer}-{head}-{dtype}")
        model = SequenceModel(ModelConfig(**SHAPE, **HEADS[head], layer=layer), seed=seed)
        trainer = Trainer(model.to(getattr(torch, dtype)), TRAINING)
        inputs = make_inputs(trainer, seed)
        np.savez(kept / f"{stem}-inputs.npz", **inputs)  # type: ignore[arg-type]
        ours = run_ours(trainer, inputs)
        np.savez(kept / f"{stem}-ours.npz", **ours)  # type: ignore[arg-type]
        theirs = run_jax(kept / f"{stem}-inputs.npz", kept / f"{stem}-jax.npz")
    report = Report(f"{layer} {head} {dtype}", facts=versions("torch", "jax"))
    compare(report, inputs, ours, theirs, TOLERANCES[dtype])
    return report


def make_inputs(trainer: Trainer, seed: int) -> Arrays:
    """What the twin's `train` reads, the same for the same seed.

    Parameters are away from every special value (prototypes on the sphere, where training keeps them), some targets are
    ignored, and the hyperparameters are the trainer's.
    """
    rng, config, model = np.random.default_rng(seed), trainer.config, trainer.model
    inputs: Arrays = {}
    for name, parameter in model.named_parameters():
        start = parameter.detach().numpy()
        start = np.asarray(start + 0.1 * rng.standard_normal(start.shape), dtype=start.dtype)
        on_sphere = name == "head.prototypes"
        inputs[f"param/{name}"] = start / np.linalg.norm(start, axis=-1, keepdims=True) if on_sphere else start
        inputs[f"sphere/{name}"] = np.array(on_sphere)
        inputs[f"decay/{name}"] = np.array(decays(name, parameter))
        inputs[f"rate/{name}"] = np.array(1.0)
    hyper = {"lr": config.lr, "beta1": config.beta1, "beta2": config.beta2, "eps": config.adam_eps}
    hyper |= {"weight_decay": config.weight_decay, "clip": config.grad_clip_norm}
    inputs |= {f"hyper/{name}": np.array(value) for name, value in hyper.items()}
    inputs["ids"] = rng.integers(0, model.config.vocab_size, (STEPS, BATCH, LENGTH))
    targets = rng.integers(0, model.config.classes, (STEPS, BATCH, LENGTH))
    inputs["targets"] = np.where(rng.random(targets.shape) < 0.1, -100, targets)
    return inputs


def run_ours(trainer: Trainer, inputs: Arrays) -> Arrays:
    """The outputs the twin's `train` names, from our model and our Trainer."""
    model = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(inputs[f"param/{name}"]))
    ids, targets = torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["targets"])
    out: dict[str, Any] = {"scores": model.scores(ids[0])}
    model(ids[0], targets[0]).backward()
    out |= {f"grad/{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    stats = [trainer.train_step(*batch) for batch in zip(ids, targets, strict=True)]
    out |= {f"updated/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    out |= {"loss": [s.loss for s in stats], "grad_norm": [s.grad_norm for s in stats]}
    return {name: np.asarray(value) for name, value in out.items()}


def run_jax(inputs: Path, outputs: Path) -> Arrays:
    """The twin's outputs, computed in its own process on the processor."""
    try:
        import jax  # noqa: F401
    except ImportError as error:
        raise missing("jax", "parity jax", error) from error
    twin = Path(__file__).with_name("jax_model.py")
    # -P: the folder of the script, which is ours, is not where the twin's imports are looked up
    done = subprocess.run(
        [sys.executable, "-P", str(twin), str(inputs), str(outputs)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"parity jax: {twin.name} failed on {inputs}: {last[0]}")
    with np.load(outputs, allow_pickle=False) as file:
        return dict(file)


def compare(report: Report, inputs: Arrays, ours: Arrays, theirs: Arrays, tolerance: Tolerance) -> None:
    """Append the rows of one case; gradients and updates parameter by parameter, the worst one shown."""
    names = [name.removeprefix("param/") for name in inputs if name.startswith("param/")]
    report.check("scores", max_abs(ours["scores"], theirs["scores"]), tolerance.absolute)
    report.check("loss", max_abs(ours["loss"], theirs["loss"]), tolerance.absolute, f"{STEPS} steps")
    gradients = {name: rms_ratio(ours[f"grad/{name}"], theirs[f"grad/{name}"]) for name in names}
    report.worst_of("gradients", gradients, tolerance.relative)
    clip = float(inputs["hyper/clip"])
    note = f"clipped to {clip:g} in {int(np.sum(theirs['grad_norm'] > clip))} of {STEPS} steps"
    report.check("gradient norm", rms_ratio(ours["grad_norm"], theirs["grad_norm"]), tolerance.relative, note)
    moved = [{name: side[f"updated/{name}"] - inputs[f"param/{name}"] for name in names} for side in (ours, theirs)]
    updates = {name: rms_ratio(moved[0][name], moved[1][name]) for name in names}
    report.worst_of("AdamW updates", updates, tolerance.relative)
