"""What `--help` prints: every command ends with examples, and each example is a command line that is understood."""

from __future__ import annotations

import argparse
import shlex

import pytest

from protomamba.cli.examples import EXAMPLES
from protomamba.cli.flags import run_config
from protomamba.cli.main import COMMANDS, parser_of
from protomamba.run_config import RunConfig

WITHOUT_EXAMPLES = {"doctor", "completion"}  # nothing to choose


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_on_lines_of_their_own(command: str) -> None:
    text = parser_of(command).format_help()
    assert (command in WITHOUT_EXAMPLES) == (command not in EXAMPLES)
    assert {f"  {line}" for line in EXAMPLES.get(command, ())} <= set(text.replace(" \\\n      ", " ").splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a choice in the line of usage, which argparse does not break."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = parser_of(command).format_help().splitlines()
    assert not [line for line in shown if len(line) > 80 and not line.lstrip().startswith("[")]


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, lines in EXAMPLES.items() for line in lines])
def test_every_example_is_understood(command: str, line: str) -> None:
    words = shlex.split(line)
    words = words[words.index("protomamba") + 1 :]
    assert words[: len(command.split())] == command.split()
    arguments = parser_of(command).parse_checked(words[len(command.split()) :])
    fields = {
        key: text for key, text in vars(arguments).items() if key.removeprefix("field:") in RunConfig.model_fields
    }
    run_config(argparse.Namespace(config=None, **fields))


def test_a_switch_says_its_values_and_a_long_flag_what_it_takes() -> None:
    text = parser_of("train").format_help()
    for shown in ("--shuffle-shards 0|1", "--time-budget TIME", "--resume PATH|auto", "--callback MODULE:CLASS"):
        assert shown in text
    assert "--exclude-seen [0|1]" in parser_of("predict").format_help()
