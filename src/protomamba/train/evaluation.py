"""A finished checkpoint judged on data: what the run held out, another part of its folder, or other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protomamba.checkpoint.file import Checkpoint
from protomamba.config import ModelConfig
from protomamba.data.prepared import open_prepared
from protomamba.data.source import Source
from protomamba.errors import ConfigError, UserError
from protomamba.model.pretrained import build_model
from protomamba.run_config import DataFields, RunConfig
from protomamba.train.build import use_machine
from protomamba.train.inputs import Held, Inputs, open_inputs, stream_spec
from protomamba.train.judging import Judgement, judge
from protomamba.train.validation import Validation, bits_per_byte, evaluate


@dataclass(frozen=True)
class Evaluation:
    """The figures of every model by name (None: they say nothing here), and the measures of the task."""

    figures: Mapping[str, Any]
    judged: Judgement


def evaluate_checkpoint(
    path: Path, loaded: Checkpoint, given: Mapping[str, Any], *, split: str = "valid", batches: int | None = None
) -> Evaluation:
    """Judge the checkpoint of `path` on the data that `given` (fields of RunConfig) names, else on the run's own.

    split: the part of a prepared folder. batches: so many, spread evenly over the data; None for all.
    """
    model = build_model(loaded)  # without a trainer: an optimizer of the user's own need not be imported
    model.precision = loaded.section("train")["precision"]
    config = _data_config(path, loaded, given, model.config)
    use_machine(config.threads, config.kernels)
    data = config.project(DataFields)
    inputs = open_inputs(data, seed=config.seed, corpus=config.out_dir / "corpus")
    source, called = _part(inputs, data, split, all_given=bool(given.keys() & {"token_file", "token_dir"}))
    held = Held(source, stream_spec(data, config.seed), batches)
    found = evaluate(model, held, calibrate=False, exact=True)
    if not found.targets:
        raise UserError("the batches to evaluate contain no targets")
    judged = judge(model, held, source.info, inputs.training)
    return Evaluation({**_figures(found, source, called), "step": loaded.part("trainer")["step"]}, judged)


def _figures(found: Validation, source: Source, called: str) -> dict[str, Any]:
    return {
        "data": called,
        "loss": found.loss,
        "nll": found.nll,
        "accuracy": found.accuracy,
        "majority_accuracy": found.majority,
        "perplexity": found.perplexity,
        f"bits_per_{source.info.raw_unit}": bits_per_byte(found.nll, source.info.bytes_per_token),
        "targets": found.targets,
    }


def _part(inputs: Inputs, data: DataFields, split: str, all_given: bool) -> tuple[Source, str]:
    """The part of the data to judge on, and what it is called."""
    if all_given:
        return inputs.training, str(data.token_file or data.token_dir)
    if split == "valid":
        if inputs.validation is None:
            raise ConfigError("the run has no validation tokens: give some with --token-file or --token-dir")
        return inputs.validation, "held out by the run"
    if data.data is None:
        raise ConfigError(f"--split {split}: the run has no prepared folder, whose parts have names")
    return open_prepared(data.data).part(split), f"{split} part of {data.data}"


def _data_config(path: Path, loaded: Checkpoint, given: Mapping[str, Any], model: ModelConfig) -> RunConfig:
    """The run's configuration with other tokens to read, all of them, where some are given."""
    base = dict(loaded.config.get("run") or {})
    given_tokens = given.keys() & {"token_file", "token_dir"}
    if not base and not given_tokens:
        raise ConfigError(f"{path}: contains no run (it was saved by the library): give --token-file or --token-dir")
    labelled = bool(base.get("label_file")) or model.n_class is not None
    if given.get("label_file") and not labelled:
        raise ConfigError(
            "--label-file: the model predicts the next token, it was trained without labels; leave it out"
        )
    base["out_dir"] = path.parent  # where the default corpus lies, also if the run's folder was moved
    if given_tokens:
        base |= dict.fromkeys(("token_file", "token_dir", "val_token_file", "val_token_dir"))
        base |= {"data": None, "label_file": None, "val_label_file": None, "val_ratio": 0.0}
    config = RunConfig.recorded({**base, **given, "vocab_size": model.vocab_size})
    if model.n_class is not None and not config.label_file and not config.data:
        raise ConfigError(f"this is a {model.classes}-class model: give the labels with --label-file")
    return config.replace(n_class=model.classes if config.label_file or model.n_class is not None else None)
