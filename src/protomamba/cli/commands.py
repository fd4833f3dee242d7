"""The work of the commands that use a finished checkpoint: eval, generate, inspect, export."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import Checkpoint
from protomamba.config import DataFields, ModelConfig, RunConfig, Sampling, TrainConfig
from protomamba.data.prepared import open_prepared
from protomamba.data.source import Source
from protomamba.data.tokenizer import Tokenizer, tokenizer_from_json
from protomamba.decode import generate, weights_loss
from protomamba.errors import ConfigError, UserError
from protomamba.model.pretrained import build_model
from protomamba.train.build import load_named_code, use_machine
from protomamba.train.callbacks.console import Console
from protomamba.train.inputs import Held, Inputs, open_inputs, stream_spec
from protomamba.train.judging import Judgement, bits_per_byte, judge, per_class
from protomamba.train.outer import trainer_class


def evaluate_command(path: Path, given: Mapping[str, Any], *, split: str, batches: int | None, as_json: bool) -> int:
    """Print loss, accuracy, perplexity and the measures of the task on the given data, or on what the run held out."""
    if batches is not None and batches < 1:
        raise ConfigError(f"--batches {batches}: expected an integer >= 1")
    loaded = checkpoint.load(path)
    _refuse_other_code(loaded, RunConfig(**given))
    trainer = trainer_class(TrainConfig.recorded(loaded.config["train"])).from_checkpoint(loaded)
    config = _data_config(path, loaded, given, trainer.model.config)
    use_machine(config.threads, config.kernels)
    data = config.project(DataFields)
    inputs = open_inputs(data, seed=config.seed, corpus=config.out_dir / "corpus")
    source, called = _part(inputs, data, split, all_given=bool(given.keys() & {"token_file", "token_dir"}))
    held = Held(source, stream_spec(data, config.seed), batches)
    found = trainer.evaluate(held)
    if not found.targets:
        raise UserError("the batches to evaluate hold no target")
    figures: dict[str, Any] = {
        "data": called,
        "loss": found.loss,
        "nll": found.nll,
        "accuracy": found.accuracy,
        "majority_accuracy": found.majority,
        "perplexity": found.perplexity,
        "bits_per_byte": bits_per_byte(found.nll, source.info.bytes_per_token),
        "targets": found.targets,
        "step": trainer.global_step,
    }
    judged = judge(trainer.model, held, source.info, inputs.training)
    if as_json:
        print(json.dumps({**figures, **judged.lines()}))
    else:
        _show(figures, judged)
    return 0


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


def _show(figures: Mapping[str, Any], judged: Judgement) -> None:
    console = Console()
    console.header({name: _shown(value) for name, value in figures.items() if value is not None})
    if judged.ranking:
        rows = {"model": judged.ranking["figures"], **judged.ranking.get("baselines", {})}
        names = list(judged.ranking["figures"])
        console.table(("", *names), [(who, *(each.get(name, 0.0) for name in names)) for who, each in rows.items()])
    if judged.classification:
        console.table(("class", "precision", "recall", "F1", "sequences"), per_class(**judged.classification))
        names = judged.classification["classes"]
        if len(names) <= SHOWN_CLASSES:
            rows_of = zip(names, judged.classification["confusion"], strict=True)
            console.table(("true \\ predicted", *names), [(name, *row) for name, row in rows_of])


# A larger confusion matrix does not fit a terminal; --json has it whole.
SHOWN_CLASSES = 16


def _refuse_other_code(loaded: Checkpoint, config: RunConfig) -> None:
    """Import the parts that the user named; ConfigError unless they are the checkpoint's own."""
    load_named_code(config)
    for what in {"layer", "layers", "head", "input"} & config.given:
        own = getattr(ModelConfig(**loaded.config["model"]), what)
        if getattr(config, what) != own:
            raise ConfigError(f"--{what} {getattr(config, what)}: the checkpoint's {what} is {own}")


def _data_config(path: Path, loaded: Checkpoint, given: Mapping[str, Any], model: ModelConfig) -> RunConfig:
    """The run's configuration with other tokens to read, all of them, where some are given."""
    base = dict(loaded.config.get("run") or {})
    given_tokens = given.keys() & {"token_file", "token_dir"}
    if not base and not given_tokens:
        raise ConfigError(f"{path}: holds no run (the library saved it): give --token-file or --token-dir")
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


def _shown(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def generate_command(arguments: argparse.Namespace, sampling: Sampling, machine: RunConfig) -> int:
    """Print what follows each prompt; text where the run has a tokenizer, tokens elsewhere."""
    loaded = checkpoint.load(arguments.checkpoint)
    use_machine(machine.threads, machine.kernels)
    _refuse_other_code(loaded, machine)
    model = build_model(loaded).eval()
    if model.config.classes != model.config.vocab_size or (loaded.config.get("run") or {}).get("label_file"):
        raise UserError(
            f"{arguments.checkpoint}: is a {model.config.classes}-class model, so it has no next token to generate; "
            "use eval"
        )
    description = loaded.config.get("tokenizer")
    tokenizer = tokenizer_from_json(description) if description else None
    texts, prompts = _prompts(arguments, tokenizer)
    started = time.perf_counter()
    stop = tokenizer.eos_token if tokenizer else None
    outputs = generate(model, prompts, sampling, stop_token=stop, weights=arguments.weights)
    seconds = time.perf_counter() - started
    if arguments.weights != "fp32":
        print(f"({weights_loss(model, max(prompts, key=len), arguments.weights)})", file=sys.stderr)
    answers = [tokenizer.decode(tokens) if tokenizer else ",".join(map(str, tokens)) for tokens in outputs]
    if arguments.json:
        rows = [
            {"prompt": text, "tokens": tokens, "text": answer if tokenizer else None}
            for text, tokens, answer in zip(texts, outputs, answers, strict=True)
        ]
        print(json.dumps({"outputs": rows, "tokens_per_s": sum(map(len, outputs)) / seconds}))
        return 0
    for text, answer in zip(texts, answers, strict=True):
        print(f"{text}{'' if tokenizer else ','}{answer}")
    print(f"({sum(map(len, outputs)) / seconds:,.0f} tokens/s)", file=sys.stderr)
    return 0


def _prompts(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[list[str], list[list[int]]]:
    """The prompts as they are shown and as tokens; without any, the end of a document, or token 0."""
    if arguments.prompt_file:
        lines = _prompt_lines(arguments.prompt_file)
        if tokenizer:
            return lines, [tokenizer.encode(line) for line in lines]
        return lines, [_token_list(line, f"{arguments.prompt_file}, line {n}") for n, line in enumerate(lines, 1)]
    if arguments.prompt_tokens is not None:
        try:
            tokens = _token_list(arguments.prompt_tokens, "--prompt-tokens")
        except UserError as error:
            raise ConfigError(str(error)) from None
        return [tokenizer.decode(tokens) if tokenizer else ",".join(map(str, tokens))], [tokens]
    if arguments.prompt is not None:
        if tokenizer is None:
            raise ConfigError("--prompt: this run has no tokenizer; give --prompt-tokens N,N,...")
        return [arguments.prompt], [tokenizer.encode(arguments.prompt)]
    start = tokenizer.eos_token if tokenizer and tokenizer.eos_token is not None else 0
    return ["" if tokenizer else str(start)], [[start]]


def _prompt_lines(path: Path) -> list[str]:
    """A prompt a line. UserError for a file that cannot be read, has no line or an empty one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompt-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: expected UTF-8 text, found other bytes at {error.start}") from None
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if not lines or empty is not None:
        raise UserError(f"--prompt-file {path}: expected a prompt a line, found none in line {empty or 1}")
    return lines


def _token_list(text: str, where: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"{where}: expected tokens as N,N,..., found {text!r}")
    return [int(part) for part in parts]


def inspect_command(path: Path, *, verify_only: bool, as_json: bool) -> int:
    """Show what a checkpoint holds and whether it is whole: exit code 0, or 1 with each defect named."""
    problems = checkpoint.verify(path)
    if verify_only or problems:
        if as_json:
            print(json.dumps({"path": str(path), "ok": not problems, "problems": problems}))
        else:
            print("\n".join(problems) if problems else f"{path}: OK")
        return 1 if problems else 0
    found = checkpoint.describe_checkpoint(path)
    if as_json:
        print(json.dumps(found))
        return 0
    console = Console()
    console.header({key: value for key, value in found.items() if not isinstance(value, list | dict)})
    console.header({f"info.{key}": value for key, value in found.get("info", {}).items()})
    tensors = found.get("tensors", [])
    console.table(
        ("part", "tensor", "shape", "dtype", "bytes"),
        [(t.get("part", ""), t["name"], "x".join(map(str, t["shape"])), t["dtype"], t["bytes"]) for t in tensors],
    )
    return 0
