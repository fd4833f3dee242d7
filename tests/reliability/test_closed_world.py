"""Promise 10: what a file says never runs code or writes outside the run folder, and nothing speaks to a network.

The interpreter's own audit events are the witness: every file opened for writing, every socket, every process started
and every module imported while a command works is written down.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protomamba.checkpoint import file as checkpoint
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.promises import Trials
from tests.runs import TINY, flags, token_file


def seen(file: Path) -> dict[str, set[str]]:
    """What the audit file lists, by kind: write, network, run, import."""
    found: dict[str, set[str]] = {kind: set() for kind in ("write", "network", "run", "import")}
    for line in file.read_text().splitlines():
        kind, _, what = line.partition(" ")
        found[kind].add(what)
    return found


def strayed(file: Path, *allowed: Path) -> str | None:
    """What the process wrote outside `allowed`, sent, or started; None if nothing."""
    found = seen(file)
    places = [os.path.realpath(place) for place in (*allowed, os.devnull)]
    outside = [w for w in found["write"] if not any(os.path.realpath(w).startswith(place) for place in places)]
    # Our kernels, and the process's own C library for the allocator's settings.
    ours = ("ctypes.dlopen (None,)", "libprotomamba")
    started = {each for each in found["run"] if not any(name in each for name in ours)}
    return (
        f"wrote {outside}, sent {found['network']}, started {started}"
        if outside or found["network"] or started
        else None
    )


def commands(out: Path, tokens: Path) -> dict[str, list[object]]:
    latest = out / "latest.safetensors"
    return {
        "train": flags(out, tokens, "--steps", 6, "--prefetch-workers", 2),
        "resume": ["train", "--resume", latest, "--steps", 3],
        "resume auto": ["train", "--resume", "auto", "--out-dir", out],
        "eval": ["eval", latest, "--token-file", tokens],
        "generate": ["generate", latest, "--prompt-tokens", "1,2", "--max-tokens", 3],
        "inspect": ["inspect", latest, "--json"],
    }


def test_commands_keep_to_their_folders(server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, out = trials(10), tmp_path / "run"
    (tmp_path / "data").mkdir()
    for name, command in commands(out, token_file(tmp_path / "data")).items():
        audit = tmp_path / f"{name}.audit"
        ended = server.run(command, Plan(audit=str(audit)))
        # A text file's parsed form is kept beside it: the data's folder is named by the user too.
        problem = strayed(audit, out, tmp_path / "data") or (None if ended.code == 0 else ended.output[-300:])
        counted.add(problem and f"{name}: {problem}")
    assert seen(tmp_path / "train.audit")["write"], "the witness is blind"
    counted.finish()


EVIL: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "out_dir elsewhere": lambda config, mark: config["run"].update(out_dir=str(mark)),
    "resume elsewhere": lambda config, mark: config["run"].update(resume=str(mark / "x.safetensors")),
    "tokens in a pipe's name": lambda config, mark: config["run"].update(token_file=f"|touch {mark}"),
    "tokenizer of nonsense": lambda config, mark: config.update(tokenizer="{'__class__': 'os.system'}"),
    "a layer that is a function": lambda config, mark: config["model"].update(layer="os:system"),
    "a head that is a function": lambda config, mark: config["model"].update(head="subprocess:Popen"),
    "a module that acts when it is imported": lambda config, mark: config["model"].update(layer="antigravity:fly"),
    "the same, in the run's flags": lambda config, mark: config["run"].update(layer="antigravity:fly"),
}


@pytest.mark.parametrize("evil", EVIL)
def test_what_a_checkpoint_says_is_only_data(
    evil: str, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, out, mark = trials(10), tmp_path / "run", tmp_path / "elsewhere"
    (tmp_path / "data").mkdir()
    every = commands(out, token_file(tmp_path / "data"))
    assert server.run(every.pop("train")).code == 0
    latest = out / "latest.safetensors"
    loaded = checkpoint.load(latest)
    EVIL[evil](loaded.config, mark)
    checkpoint.save(latest, loaded.parts, config=loaded.config, info=loaded.info)
    for name, command in every.items():
        audit = tmp_path / f"{name}.audit"
        ended = server.run(command, Plan(audit=str(audit)))
        problem = strayed(audit, out, tmp_path / "data")
        if any("antigravity" in body for body in seen(audit)["import"]) or mark.exists():
            problem = "it was done"
        if ended.code not in (0, 1, 2) or "Traceback" in ended.output:
            problem = f"exit {ended.code}: {ended.output[-300:]}"
        counted.add(problem and f"{name}: {problem}")
    counted.finish()


def test_code_of_ones_own_runs_when_it_is_named_and_only_then(
    server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, out, name = trials(10), tmp_path / "run", "examples.lstm_layer:LSTMLayer"
    tokens = token_file(tmp_path)
    assert server.run(flags(out, tokens, "--steps", 3, "--layer", name)).code == 0
    every = commands(out, tokens)
    grown = ["train", *TINY, "--out-dir", tmp_path / "grown", "--init-from", out / "latest.safetensors", "--steps", 1]
    every |= {"init": [*grown, "--token-file", tokens]}
    del every["train"], every["inspect"]
    for each, command in every.items():
        refused, done = server.run(command), server.run([*command, "--layer", name])
        asked = refused.code == 1 and f"add --layer {name}" in refused.output
        counted.add(None if asked and done.code == 0 else f"{each}: {refused} {done}")
    counted.finish()


class Bomb:
    """Unpickled, it makes the file that it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".bin", ".txt", ".yaml", ".json", ".toml"])
def test_pickles_and_yaml_tags_are_refused_unread(
    suffix: str, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, mark = trials(10), tmp_path / "mark"
    path = tmp_path / f"evil{suffix}"
    if suffix == ".npy":
        np.save(path, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    elif suffix == ".yaml":
        path.write_text(f"lr: !!python/object/apply:os.system ['touch {mark}']\n")
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    if suffix in (".yaml", ".json", ".toml"):
        tries = [["train", "--config", path]]
    elif suffix == ".safetensors":
        tries = [["train", "--resume", path], ["eval", path], ["generate", path], ["inspect", path]]
        tries.append(["train", *TINY, "--init-from", path, "--out-dir", tmp_path / "run"])
    else:
        tries = [["train", *TINY, "--token-file", path, "--out-dir", tmp_path / "run"]]
    for number, command in enumerate(tries):
        audit = tmp_path / f"{number}.audit"
        ended = server.run(command, Plan(audit=str(audit)))
        problem = strayed(audit, tmp_path) or ("it went off" if mark.exists() else None)
        bad_end = ended.code not in (1, 2) or "Traceback" in ended.output
        counted.add(problem or (f"exit {ended.code}: {ended.output}" if bad_end else None))
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud"
    counted.finish()


def test_no_test_reaches_a_network() -> None:
    """The block of tests/conftest.py holds, in the process that runs the tests."""
    with socket.socket() as outward, pytest.raises(RuntimeError, match="reached for the network"):
        outward.connect(("127.0.0.1", 9))
    with pytest.raises(RuntimeError, match="reached for the network"):
        socket.getaddrinfo("localhost", 80)


def test_the_sources_name_no_door(trials: Callable[[int], Trials]) -> None:
    """No module of ours imports pickle, or anything that speaks to a network."""
    import ast

    counted = trials(10)
    doors = {"pickle", "dill", "shelve", "marshal", "http", "urllib", "requests", "ssl", "ftplib", "smtplib", "asyncio"}
    for file in sorted((Path(checkpoint.__file__).parents[1]).rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.hub", "torch.save"):
                names.add("pickle")
        used = {name.partition(".")[0] for name in names} & doors
        counted.add(f"{file}: {used}" if used else None)
    counted.finish()
