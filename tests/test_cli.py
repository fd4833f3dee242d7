"""The command line's contract: flags, files, bounds, nearest names, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protomamba.cli.flags import Parser, add_fields, run_config
from protomamba.cli.main import COMMANDS, main
from protomamba.run_config import RunConfig
from protomamba.schema import flag, value_type
from tests.runs import token_file, train

# The CLI reference of the crate this succeeds, and command-line.md's further flags: name and default, as documented.
DOCUMENTED = """
out-dir runs | steps 5000 | save-every 200 | log-every 20 | batch-size 8 | seq-len 64 | seed 42 | base-layers 2
target-layers 6 | d-model 512 | d-state 16 | d-conv 4 | placement specific:1,3,4,5 | freeze first:2 | lr 0.0001
ff-lr 0.0001 | bp-cadence-steps 32 | gradient-surgery-method pcgrad | gradient-surgery-epsilon 1e-08
gradnorm-alpha 0.2 | cagrad-lambda 1 | freeze-embedding 0 | token-file none | token-dir none | val-token-file none
val-token-dir none | shard-ext txt | shuffle-shards 1 | packed-sequences 1 | prefetch-workers 0 | prefetch-buffer 16
resume none | vocab-size auto | val-ratio 0.05 | val-every 200 | eval-batches 8 | early-stopping-patience 0
grad-clip-norm 0 | fail-on-non-finite 0 | lr-warmup-steps 0 | lr-min-scale 0.1 | layer mamba | head hpn | expand 2
dt-rank auto | precision fp32 | threads auto | kernels auto | init-from none | weight-decay 0.01 | beta1 0.9
beta2 0.999 | adam-eps 1e-08 | grad-accum 1 | keep-last 1 | eos-token none | reset-at-eos 0 | progress auto
"""


def parse(*arguments: object) -> RunConfig:
    parser = Parser(prog="protomamba train")
    parser.add_argument("--config", type=Path)
    add_fields(parser, list(RunConfig.model_fields))
    return run_config(parser.parse_checked([str(a) for a in arguments]))


@pytest.mark.parametrize("entry", [e.strip() for e in re.split(r"[|\n]", DOCUMENTED) if e.strip()])
def test_every_documented_flag_has_its_documented_default_and_help(
    entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, default = entry.split()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    _, options = capsys.readouterr().out.split("options:")
    assert all(f"\n{title}:\n" in options for title in ("model", "training", "growing and freezing", "data", "run"))
    shown = " ".join(options.split())
    found = re.search(rf"--{name} \S+ (.*?) \[(\S+)\]", shown)
    assert found is not None and found[2] == default, entry


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert COMMANDS[command][0] in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1", "true", "True", "0", "false"])
def test_booleans(text: str) -> None:
    assert parse("--freeze-embedding", text).freeze_embedding is (text.lower() in ("1", "true"))


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_a_file_gives_values_and_flags_win(tmp_path: Path, suffix: str) -> None:
    text = {
        "toml": 'd-model = 96\nlr = 1e-3\nfreeze = "none"\nbp-cadence-steps = 4\n',
        "yaml": "d-model: 96\nlr: 1e-3\nfreeze: none\nbp_cadence_steps: 4\n",
        "json": '{"d-model": 96, "lr": 1e-3, "freeze": "none", "bp_cadence_steps": 4}',
    }[suffix]
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = parse("--config", path, "--d-model", 32)
    assert (config.d_model, config.lr, config.freeze, config.bp_cadence_steps) == (32, 1e-3, "none", 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--d-modle", "8"], r"unknown flag --d-modle \(did you mean --d-model\?\)"),
        (["--lr", "-1"], r"--lr '-1': expected a finite number > 0 and <= 10"),
        (["--lr", "nan"], r"--lr 'nan': expected a finite number"),
        (["--steps", "0"], r"--steps '0': expected an integer >= 1"),
        (["--steps", "2.5"], r"--steps '2.5': expected an integer"),
        (["--beta2", "1"], r"--beta2 '1': expected .*< 1"),
        (["--precision", "fp16"], r"--precision 'fp16': expected one of fp32, bf16"),
        (["--freeze-embedding", "maybe"], r"--freeze-embedding 'maybe': expected 1, 0, true or false"),
        (["--lr"], r"expected one argument"),
        (["data", "extra"], r"unknown argument extra"),
        (["--config", "run.ini"], r"expected a .toml, .yaml or .json file, found .ini"),
        (["--config", "missing.toml"], r"missing.toml: cannot be read: No such file"),
        (["--freeze", "last:1"], r"--freeze last:1: expected none, first:N"),
        (["--placement", "specific:1"], r"names 1 positions, but 4 layers are new"),
        (["--layer", "mamba2"], r"--layer mamba2: expected mamba, compact"),
        (["--reset-at-eos", "1"], r"--reset-at-eos 1 needs --eos-token"),
        (["--token-dir", "x", "--token-file", "y"], r"exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = token_file(tmp_path)
    data = [] if "--token-dir" in arguments else ["--token-file", str(tokens)]
    assert main(["train", "--out-dir", str(tmp_path / "run"), "--d-model", "8", *data, *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said) and said.count("\n") == 1, said


@pytest.mark.parametrize("body", ["d-modle = 1", "lr = 'fast'", "lr = ", "[model]\nd-model = 1"])
def test_a_wrong_config_file_is_exit_2(body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(body)
    assert main(["train", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("protomamba: ") and said.count("\n") == 1


def test_commands_and_their_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0 and main(["--version"]) == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from protomamba.errors import UserError

    with pytest.raises(UserError):
        main(["train", "--debug", "--lr", "-1", "--out-dir", str(tmp_path)])


def test_surprising_defaults_are_told_with_the_way_to_turn_them_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = token_file(tmp_path)
    more = ["--base-layers", 2, "--target-layers", 6, "--freeze", "first:2", "--bp-cadence-steps", 32]
    assert train(tmp_path / "run", tokens, "--steps", 2, *more) == 0
    shown = capsys.readouterr().out
    for way in ("--bp-cadence-steps 1", "--freeze none", "--target-layers"):
        assert way in shown
    train(tmp_path / "plain", tokens, "--steps", 2)
    assert "note:" not in capsys.readouterr().out


def test_the_flags_are_the_schema() -> None:
    assert {flag(name) for name in RunConfig.model_fields} >= {
        f"--{e.split()[0]}" for e in re.split(r"[|\n]", DOCUMENTED) if e.strip()
    }


def test_threads_are_called_threads_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some text\n")
    for word in ("--threads", "--jobs"):
        out = str(tmp_path / word)
        assert main(["prepare", str(tmp_path / "text.txt"), "--out-dir", out, word, "2"]) == 0
        assert main(["prepare", str(tmp_path / "text.txt"), "--out-dir", out, word, "0"]) == 2
        assert "--threads 0: expected an integer >= 1" in capsys.readouterr().err
    for command in ("train", "eval", "generate", "bench", "prepare"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        assert "--threads" in capsys.readouterr().out, command


def test_a_flag_of_two_values_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    two = [name for name in RunConfig.model_fields if value_type(RunConfig.model_fields[name].annotation) is bool]
    assert two and all(f"{flag(name)} 0|1 " in shown for name in two)


def test_parity_lists_its_own_flags_and_takes_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["parity", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--random" in shown and "--d-model" not in shown and "protomamba train --help" in shown
    assert main(["parity", "resume", "--d-modle", "8"]) == 2
    assert "did you mean --d-model?" in capsys.readouterr().err
