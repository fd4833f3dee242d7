"""`protomamba parity growth`: build, grow and train a few steps on one's own flags, and see what growing promises.

The base model and the grown one are built as `protomamba train` builds them, from the same seed or the same weights.
Right after growing nothing that comes out may differ in a bit; then every new parameter must move from the second
update on, and no frozen one ever. Nothing is written but to a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from protomamba.data.stream import BatchStream
from protomamba.errors import ConfigError
from protomamba.model.growth import new_positions
from protomamba.model.sequence_model import SequenceModel
from protomamba.parity.report import Report, versions
from protomamba.run_config import DataFields, RunConfig
from protomamba.train.build import use_machine
from protomamba.train.fresh import fresh_trainer
from protomamba.train.initial_weights import InitialWeights, adapt_to_weights, read_initial_weights
from protomamba.train.inputs import open_inputs, stream_spec
from protomamba.train.passes import MicroBatch
from protomamba.train.trainer import Trainer, renamed_layers

# New parameters move from the second update on; one more shows that they go on.
UPDATES = 3
DECODED = 8  # tokens of the first row that are also run one at a time
Named = dict[str, Tensor]


def run(config: RunConfig, steps: int | None = None) -> Report:
    """Probe a configuration over `steps` train steps, at least as many as two updates by backpropagation take.

    Without `steps`: three such updates. Raises ConfigError where the configuration has no room for them, UserError
    where data or weights cannot be read.
    """
    if config.resume is not None:
        raise ConfigError("parity growth builds models of its own: leave --resume out (--init-from gives them weights)")
    if config.final_layers == config.base_layers and not config.init_from:
        raise ConfigError("parity growth: nothing grows: give a --target-layers above --base-layers")
    steps = max(steps or UPDATES * config.bp_cadence_steps, 2 * config.bp_cadence_steps)
    if config.steps < steps:
        raise ConfigError(f"--steps {config.steps}: the probe needs {steps}, for two updates by backpropagation")
    use_machine(config.threads, config.kernels)
    weights = read_initial_weights(config.init_from) if config.init_from else None
    config = adapt_to_weights(config, weights) if weights else config
    with tempfile.TemporaryDirectory(prefix="protomamba-parity-") as scratch:
        config = config.replace(out_dir=Path(scratch))
        inputs = open_inputs(config.project(DataFields), seed=config.seed, corpus=config.out_dir / "corpus")
        config = config.replace(**inputs.decided)
        stream = inputs.training.stream(stream_spec(config.project(DataFields), config.seed))
        return _probe(config, weights, stream, inputs.vocab_size, steps)


def _probe(
    config: RunConfig, weights: InitialWeights | None, stream: BatchStream, vocab_size: int, steps: int
) -> Report:
    report = Report("growth", facts={**versions("torch"), "steps": str(steps), "seed": str(config.seed)})
    ungrown = config.replace(target_layers=config.base_layers, freeze="none", freeze_embedding=False)
    base, _ = fresh_trainer(ungrown, vocab_size, weights)
    grown, _ = fresh_trainer(config, vocab_size, weights)
    positions = new_positions(config.placement, config.base_layers, config.final_layers)
    report.facts["grown"] = f"{config.base_layers} to {config.final_layers} layers"
    report.facts["new layers"] = ", ".join(map(str, positions)) or "none"
    origins = layer_origins(positions, config.final_layers)
    check_identity(report, base.model, grown.model, _batch(stream, 0))
    check_inherited(report, base, grown, origins, weights)
    watched = train(grown, stream, config.grad_accum, steps)
    check_movement(report, grown, watched, positions)
    return report


def layer_origins(positions: list[int], target: int) -> list[int | None]:
    """For each layer of the grown model the index it had before; None for a new one."""
    old = iter(range(target))
    return [None if index in positions else next(old) for index in range(target)]


def _batch(stream: BatchStream, index: int) -> MicroBatch:
    batch = stream.batch(index)
    return batch.tokens_BL, batch.targets_BL, batch.reset_BL


@torch.no_grad()
def check_identity(report: Report, base: SequenceModel, grown: SequenceModel, batch: MicroBatch) -> None:
    """Three rows: values that differ in what the head sees, the same token by token, and the difference in the loss.

    What the head sees is compared rather than B x L x V scores: the head itself is compared by `check_inherited`.
    """
    tokens_BL, targets_BL, reset_BL = batch
    before_BLD, after_BLD = (model.features(tokens_BL, reset_BL=reset_BL)[0] for model in (base, grown))
    _, length, width = before_BLD.shape
    report.check("outputs that differ", different_values(before_BLD, after_BLD), 0, f"{before_BLD.numel():,} values")
    stepped = [torch.stack(_decode(model, tokens_BL[:1, :DECODED])) for model in (base, grown)]
    note = f"{min(DECODED, length)} tokens, {width} values each"
    report.check("outputs that differ, token by token", different_values(*stepped), 0, note)
    losses = [float(model.head(z_BLD, targets_BL)) for model, z_BLD in ((base, before_BLD), (grown, after_BLD))]
    report.check("difference in loss", abs(losses[0] - losses[1]), 0, f"loss {losses[0]:.6f}")


def _decode(model: SequenceModel, tokens_1L: Tensor) -> list[Tensor]:
    """z after each token of one row, run one at a time."""
    state, outputs = model.initial_state(), []
    for token_1 in tokens_1L.unbind(1):
        z_1D, state = model.decode_step(token_1, state)
        outputs.append(z_1D.clone())
    return outputs


def check_inherited(
    report: Report, base: Trainer, grown: Trainer, origins: list[int | None], weights: InitialWeights | None
) -> None:
    """Rows for what the grown trainer takes over: every parameter and buffer, and a checkpoint's moments."""
    expected = renamed_layers(base.model.state_dict(), origins)
    found = grown.model.state_dict()
    different = [name for name in expected if different_values(expected[name], found[name])]
    report.check("old tensors that differ", len(different), 0, _counted(len(expected), "tensors", different))
    if weights and weights.moments:
        kept, present = renamed_layers(weights.moments, origins), grown.optimizer.state()
        trained = grown.optimizer.named
        lost = [
            name
            for name, moments in kept.items()
            if name in trained
            and (name not in present or any(different_values(moments[k], present[name][k]) for k in moments))
        ]
        report.check("old moments that differ", len(lost), 0, _counted(len(kept.keys() & trained), "parameters", lost))


def train(trainer: Trainer, stream: BatchStream, grad_accum: int, steps: int) -> list[Named]:
    """Take `steps` train steps; all parameters before the first, after the first backpropagation, and at the end."""
    watched = [snapshot(trainer.model)]
    for step in range(steps):
        stats = trainer.train_step(*(stream.batch(step * grad_accum + part) for part in range(grad_accum)))
        if stats.bp_applied and len(watched) == 1:
            watched.append(snapshot(trainer.model))
    return [*watched, snapshot(trainer.model)]


def snapshot(model: SequenceModel) -> Named:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_movement(report: Report, trainer: Trainer, watched: list[Named], positions: list[int]) -> None:
    """Rows: new parameters that stand still after the first update, frozen ones that moved or have optimizer state.

    What moved at all is a fact of the report.
    """
    start, first, end = watched
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    new = [f"layers.{index}." for index in positions]
    fresh = [name for name in start if name.startswith(tuple(new)) and name not in frozen]
    still = [name for name in fresh if not different_values(first[name], end[name])]
    if fresh:
        report.check("new parameters that do not move", len(still), 0, _counted(len(fresh), "parameters", still))
    moved = [name for name in start if different_values(start[name], end[name])]
    wrong = [name for name in frozen if name in moved]
    if frozen:
        report.check("frozen parameters that moved", len(wrong), 0, _counted(len(frozen), "parameters", wrong))
        held = [name for name in frozen if name in trainer.optimizer.state()]
        report.check("frozen parameters with optimizer state", len(held), 0, _counted(len(frozen), "parameters", held))
    report.facts["moved"] = moved_parts(moved) or "nothing"


def moved_parts(names: list[str]) -> str:
    """'layers 1, 3; embedding, head': the parts of the model that some moved parameter belongs to."""
    layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers.")})
    others = dict.fromkeys(name.partition(".")[0] for name in names if not name.startswith("layers."))
    parts = [f"layers {', '.join(map(str, layers))}"] if layers else []
    return "; ".join([*parts, *([", ".join(others)] if others else [])])


def _counted(count: int, what: str, wrong: list[str]) -> str:
    return f"of {count} {what}" + (f"; first: {wrong[0]}" if wrong else "")


def different_values(one: Tensor, other: Tensor) -> int:
    """In how many values two tensors of one shape differ in a bit: 0.0 is not -0.0, and a NaN is itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return max(one.numel(), other.numel(), 1)
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return int((a != b).reshape(-1, one.element_size()).any(-1).sum()) if one.numel() else 0
