"""`protomamba generate`: what follows a prompt; of one prompt as it is made, of several when all have ended."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from protomamba.cli.checkpoints import A_CHECKPOINT, CODE_FLAGS, MACHINE_FLAGS, THE_CHECKPOINTS, refuse_other_code
from protomamba.cli.flags import Parser, add_fields, given_fields
from protomamba.config import Sampling
from protomamba.errors import ConfigError, UserError
from protomamba.run_config import RunConfig

if TYPE_CHECKING:
    from protomamba.checkpoint.file import Checkpoint
    from protomamba.data.text_stream import TextUntil
    from protomamba.data.tokenizer import Tokenizer
    from protomamba.model.sequence_model import SequenceModel


def configure(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=A_CHECKPOINT)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", metavar="TEXT", help="text to continue, if the run has a tokenizer [end of document, or token 0]"
    )
    source.add_argument("--prompt-tokens", metavar="N,N,...", help="tokens to continue")
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="file with one prompt per line: text, or tokens N,N,..."
    )
    about = "stop before this text, which is not printed; repeatable"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=f"{about} [none]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    about = "precision of the weights; int8 is about four times as fast as fp32, and its cost is printed [%(default)s]"
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="fp32", help=about)
    add_fields(parser, list(Sampling.model_fields), Sampling)
    add_fields(parser, CODE_FLAGS, of_checkpoint=THE_CHECKPOINTS)
    add_fields(parser, MACHINE_FLAGS)


def work(arguments: argparse.Namespace) -> int:
    """Print what follows each prompt; text where the run has a tokenizer, tokens elsewhere."""
    from protomamba.checkpoint import file as checkpoint
    from protomamba.decode import weights_loss
    from protomamba.train.build import use_machine

    given = given_fields(arguments)
    sampling = Sampling(**{name: given.pop(name) for name in list(given) if name in Sampling.model_fields})
    machine = RunConfig(**given)
    loaded = checkpoint.load(arguments.checkpoint)
    use_machine(machine.threads, machine.kernels)
    refuse_other_code(loaded, machine)
    model, tokenizer = _model(arguments.checkpoint, loaded), _tokenizer(loaded)
    texts, prompts = _prompts(arguments, tokenizer)
    answers = [Answer.of(text, tokenizer, arguments.stop) for text in texts]
    writer = Writer(answers, shown=len(answers) == 1 and not arguments.json)
    rate = _answer(model, prompts, sampling, tokenizer, arguments.weights, writer)
    if arguments.weights != "fp32":
        print(f"({weights_loss(model, max(prompts, key=len), arguments.weights)})", file=sys.stderr)
    _show(answers, rate, as_json=arguments.json)
    return 0


def _model(path: Path, loaded: Checkpoint) -> SequenceModel:
    """UserError for a model that does not predict tokens."""
    from protomamba.model.pretrained import build_model

    model = build_model(loaded).eval()
    if model.config.classes != model.config.vocab_size or (loaded.config.get("run") or {}).get("label_file"):
        raise UserError(
            f"{path}: is a {model.config.classes}-class model, so it has no next token to generate; use eval or predict"
        )
    return model


def _tokenizer(loaded: Checkpoint) -> Tokenizer | None:
    from protomamba.data.tokenizer import tokenizer_from_json

    description = loaded.config.get("tokenizer")
    return tokenizer_from_json(description) if description else None


@dataclass
class Answer:
    """What follows one prompt: `text`, where the run has a tokenizer, and the tokens."""

    prompt: str
    until: TextUntil | None
    drawn: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: str, tokenizer: Tokenizer | None, stops: Sequence[str]) -> Answer:
        """ConfigError for stop strings without text."""
        from protomamba.data.text_stream import TextUntil

        if stops and tokenizer is None:
            raise ConfigError("--stop: this run has no tokenizer, so its tokens have no text to stop at")
        return cls(prompt, TextUntil(tokenizer, stops) if tokenizer else None)

    def add(self, token: int) -> str:
        """What the token adds to what is shown."""
        self.drawn.append(token)
        return self.until.add(token) if self.until else f",{token}"

    def finish(self) -> str:
        return self.until.finish() if self.until else ""

    @property
    def is_stopped(self) -> bool:
        return self.until is not None and self.until.stopped is not None

    @property
    def shown(self) -> str:
        return self.until.text if self.until else "".join(f",{token}" for token in self.drawn)

    def line(self) -> dict[str, object]:
        """The fields of --json."""
        if self.until is None:
            return {"prompt": self.prompt, "tokens": self.drawn, "text": None}
        stop = {"stop": self.until.stopped} if self.is_stopped else {}
        return {"prompt": self.prompt, "tokens": self.until.tokens(), "text": self.until.text, **stop}


@dataclass
class Writer:
    """Takes the tokens of every position; `shown`: prints those of the one answer at once, behind its prompt."""

    answers: Sequence[Answer]
    shown: bool

    def begin(self) -> None:
        if self.shown:
            self._print(self.answers[0].prompt)

    def add(self, tokens: Sequence[int]) -> list[int]:
        """The answers that are to end here: at a stop string, or because nobody reads any more."""
        for answer, token in zip(self.answers, tokens, strict=True):
            if token >= 0:
                self._print(answer.add(token))
        unheard = getattr(sys.stdout, "lost", None) is not None
        return [row for row, answer in enumerate(self.answers) if unheard or answer.is_stopped]

    def finish(self) -> None:
        for answer in self.answers:
            self._print(answer.finish())
        self._print("\n")

    def _print(self, text: str) -> None:
        if self.shown and text:
            print(text, end="", flush=True)


def _answer(
    model: SequenceModel,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer: Tokenizer | None,
    weights: str,
    writer: Writer,
) -> float:
    """Fill the answers; tokens a second."""
    from protomamba.decode import check_prompts, generate

    check_prompts(model, prompts)
    writer.begin()
    started = time.perf_counter()
    stop = tokenizer.eos_token if tokenizer else None
    outputs = generate(model, prompts, sampling, stop_token=stop, on_token=writer.add, weights=weights)
    rate = sum(map(len, outputs)) / (time.perf_counter() - started)
    writer.finish()
    return rate


def _show(answers: Sequence[Answer], rate: float, *, as_json: bool) -> None:
    """All answers at once, but for the one that was shown as it was made; the rate beside them."""
    if as_json:
        print(json.dumps({"outputs": [answer.line() for answer in answers], "tokens_per_s": rate}))
        return
    for answer in answers if len(answers) > 1 else ():
        print(f"{answer.prompt}{answer.shown}")
    print(f"({rate:,.0f} tokens/s)", file=sys.stderr)


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
        raise UserError(f"--prompt-file {path}: expected one prompt per line, found none in line {empty or 1}")
    return lines


def _token_list(text: str, where: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"{where}: expected tokens as N,N,..., found {text!r}")
    return [int(part) for part in parts]
