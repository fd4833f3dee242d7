"""A run can be observed and fed: callbacks in order, their state in the checkpoint, data of one's own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.runs import losses, metrics, same_state, token_file, train

from protomamba import Callback, CollapseWatch, DatasetStream, ModelConfig, Run, SequenceModel, TrainConfig, Trainer
from protomamba.checkpoint import file as checkpoint
from protomamba.errors import UserError
from protomamba.train.callbacks.save_advice import rare_enough
from protomamba.train.comm import Comm, Local

ROOT = Path(__file__).resolve().parents[2]


class Sums(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows of 5 to 8 digits, and at each place the sum so far modulo 10."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        digits = torch.randint(0, 10, (5 + index % 4,), generator=torch.Generator().manual_seed(index))
        return digits, digits.cumsum(0) % 10


def make(steps: int = 12) -> tuple[Trainer, DatasetStream]:
    model = SequenceModel(ModelConfig(vocab_size=10, d_model=8, n_layer=1, d_state=4), seed=0)
    return Trainer(model, TrainConfig(lr=1e-2, steps=steps)), DatasetStream(Sums(), batch_size=4, seed=3)


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_start(self, run: Run) -> None:
        self.lines.append(f"start {run.trainer.global_step}")

    def on_step(self, run: Run, stats: Any) -> None:
        self.lines.append(f"step {stats.step}")

    def on_validation(self, run: Run, result: Any) -> None:
        self.lines.append(f"validation {run.trainer.global_step}")

    def on_save(self, run: Run, report: Any) -> None:
        self.lines.append(f"save {run.trainer.global_step}")

    def on_end(self, run: Run, reason: str) -> None:
        self.lines.append(f"end {reason}")


class Counter(Callback):
    """Counts steps, over resumes."""

    name = "counter"
    steps = 0

    def on_step(self, run: Run, stats: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "tensor": torch.tensor([self.steps])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        assert state["tensor"].tolist() == [self.steps]


class Noise(Callback):
    """Draws from every generator there is."""

    def on_step(self, run: Run, stats: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()


class Listener(Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_message(self, run: Run, text: str, warning: bool) -> None:
        self.heard.append(text)


def test_callbacks_are_told_in_order(tmp_path: Path) -> None:
    trainer, stream = make(3)
    diary = Diary()
    reason = Run(trainer, stream, [stream.batch(0)], [diary], tmp_path / "run", val_every=2, save_every=3).fit()
    assert reason == "done"
    assert diary.lines == [
        *("start 0", "step 1", "step 2", "validation 2", "save 2"),
        *("step 3", "validation 3", "save 3", "end done"),
    ]


def test_without_a_folder_nothing_is_kept_and_all_else_works() -> None:
    trainer, stream = make(3)
    diary = Diary()
    assert Run(trainer, stream, callbacks=[diary]).fit() == "done"
    assert diary.lines == ["start 0", "step 1", "step 2", "step 3", "end done"]


def test_a_run_with_large_checkpoints_is_told_what_saving_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []

    class Listener(Callback):
        def on_message(self, run: Run, text: str, warning: bool) -> None:
            told.append((text, warning))

    Run(*make(), callbacks=[Listener()], folder=tmp_path / "small", save_every=2).fit()
    assert not told
    monkeypatch.setattr("protomamba.train.callbacks.save_advice.LARGE", 1)
    Run(*make(), callbacks=[Listener()], folder=tmp_path / "large", save_every=2).fit()
    assert [text.split()[:3] for text, _ in told] == [["a", "checkpoint", "takes"], ["a", "save", "took"]]
    assert "--save-every" in told[1][0] and "(at 2 they take" in told[1][0]


def test_saves_that_are_rare_enough_take_less_than_a_twentieth_of_the_time() -> None:
    for save_s, step_s in ((9.5, 0.1), (0.004, 0.01), (120.0, 0.47), (1e-6, 1.0)):
        steps = rare_enough(save_s, step_s)
        assert save_s / (save_s + steps * step_s) <= 0.05
        assert steps == 1 or save_s / (save_s + steps / 1.2 * step_s) > 0.05, "and not much rarer than that"
    assert rare_enough(9.5, 0.1) == 1_900


def test_a_state_enters_the_checkpoint_and_comes_back(tmp_path: Path) -> None:
    trainer, stream = make(4)
    Run(trainer, stream, callbacks=[Counter()], folder=tmp_path / "run").fit()
    trainer, stream = make(4)
    counter = Counter()
    assert Run(trainer, stream, callbacks=[counter], folder=tmp_path / "run", resume="auto", further_steps=3).fit()
    assert counter.steps == 7 and trainer.global_step == 7


def test_a_state_without_its_callback_is_told_and_dropped(tmp_path: Path) -> None:
    trainer, stream = make(4)
    Run(trainer, stream, callbacks=[Counter()], folder=tmp_path / "run").fit()
    trainer, stream = make(4)
    listener = Listener()
    again = Run(trainer, stream, callbacks=[listener], folder=tmp_path / "run", resume="auto", further_steps=1)
    again.fit()
    assert any("state of the callback counter is dropped" in line for line in listener.heard)
    assert "counter" not in checkpoint.load(tmp_path / "run" / "latest.safetensors").parts["callbacks"]


def test_what_a_callback_draws_does_not_change_the_run(tmp_path: Path) -> None:
    for name, callbacks in (("quiet", []), ("noisy", [Noise()])):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        trainer, stream = make(4)
        Run(trainer, stream, callbacks=callbacks, folder=tmp_path / name).fit()
    same_state(tmp_path / "quiet" / "latest.safetensors", tmp_path / "noisy" / "latest.safetensors")


def test_an_exception_in_a_callback_stops_the_run_and_is_recorded(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_step(self, run: Run, stats: Any) -> None:
            if stats.step == 3:
                raise UserError("the third step is one too many")

    trainer, stream = make(9)
    with pytest.raises(UserError, match="one too many"):
        Run(trainer, stream, callbacks=[Failing()], folder=tmp_path / "run", log_every=1).fit()
    lines = metrics(tmp_path / "run")
    assert lines[-1]["event"] == "end" and lines[-1]["reason"] == "failed" and "third step" in lines[-1]["error"]
    assert trainer.global_step == 3


def test_a_callback_can_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_step(self, run: Run, stats: Any) -> None:
            if stats.step == 2:
                run.stop("enough")

    trainer, stream = make(9)
    assert Run(trainer, stream, callbacks=[Enough()], folder=tmp_path / "run").fit() == "enough"
    assert checkpoint.read_info(tmp_path / "run" / "latest.safetensors")["step"] == 2


def test_a_run_of_ones_own_data_cut_at_any_step_goes_on_to_the_bit(tmp_path: Path) -> None:
    trainer, stream = make(12)
    Run(trainer, stream, [stream.batch(0)], folder=tmp_path / "straight", log_every=1, val_every=5).fit()
    for cut in (1, 7, 11):
        folder = tmp_path / f"cut{cut}"
        for stop_at in (cut, None):

            class Stop(Callback):
                def on_step(self, run: Run, stats: Any, at: int | None = stop_at) -> None:
                    if stats.step == at:
                        run.stop("signal")

            trainer, stream = make(12)
            options: dict[str, Any] = {"log_every": 1, "val_every": 5, "resume": "auto"}
            Run(trainer, stream, [stream.batch(0)], [Stop()], folder, **options).fit()
        assert losses(folder) == losses(tmp_path / "straight")
        same_state(folder / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")


def test_another_dataset_is_refused_by_its_length_or_fingerprint(tmp_path: Path) -> None:
    trainer, stream = make(2)
    Run(trainer, stream, folder=tmp_path / "run").fit()
    trainer, _ = make(2)
    other = DatasetStream(Sums(), batch_size=4, seed=3, fingerprint="v2")
    with pytest.raises(UserError, match="dataset has other contents"):
        Run(trainer, other, folder=tmp_path / "run", resume="auto", further_steps=1).fit()


def test_another_trainer_is_refused_by_name(tmp_path: Path) -> None:
    trainer, stream = make(2)
    Run(trainer, stream, folder=tmp_path / "run").fit()
    other = Trainer(SequenceModel(ModelConfig(vocab_size=10, d_model=16, n_layer=1, d_state=4)), TrainConfig(lr=1e-2))
    with pytest.raises(UserError, match="d_model: the checkpoint has 8, this trainer 16"):
        Run(other, stream, folder=tmp_path / "run", resume="auto").fit()


def test_a_fresh_run_does_not_bury_another(tmp_path: Path) -> None:
    trainer, stream = make(2)
    Run(trainer, stream, folder=tmp_path / "run").fit()
    trainer, stream = make(2)
    with pytest.raises(UserError, match="--resume auto"):
        Run(trainer, stream, folder=tmp_path / "run").fit()


def test_validation_that_can_be_read_only_once_is_refused() -> None:
    trainer, stream = make(2)
    with pytest.raises(TypeError, match="only once; give a list"):
        Run(trainer, stream, (stream.batch(i) for i in range(2)))


def test_the_ranks_of_a_run_are_its_trainers() -> None:
    trainer, stream = make(2)
    assert Run(trainer, stream, comm=Local()).fit() == "done"
    with pytest.raises(ValueError, match="give it these"):
        Run(trainer, stream, comm=cast(Comm, object()))


def test_each_epoch_of_a_dataset_shows_each_item_once() -> None:
    stream = DatasetStream(Sums(), batch_size=4, seed=1)
    order = [item for index in range(25) for item in stream.items_of(index)]
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) and order[:50] != order[50:]
    first = stream.batch(3)
    assert torch.equal(first.tokens_BL, DatasetStream(Sums(), batch_size=4, seed=1).batch(3).tokens_BL)
    short = first.targets_BL == -100
    assert bool(short.any()) and not bool(short[:, 0].any())


def test_the_watch_for_collapse_works_in_a_library_run() -> None:
    trainer, stream = make(1)
    with torch.no_grad():
        trainer.model.head.prototypes.copy_(torch.ones(10, 8))
    trainer.model.head.requires_grad_(False)
    trainer.optimizer, trainer.rows = trainer._new_optimizer()
    listener = Listener()
    Run(trainer, stream, [stream.batch(0)], [CollapseWatch(), listener]).fit()
    assert any(line.startswith("collapse: ") for line in listener.heard)


def test_the_watch_for_collapse_keeps_still_where_there_is_no_room() -> None:
    """40 directions in a plane are 9 degrees apart at best, a cosine of 0.99."""
    model = SequenceModel(ModelConfig(vocab_size=40, d_model=2, n_layer=1), seed=0)
    assert model.head.diagnostics()["nearest_cosine"] > 0.9
    trainer, stream = Trainer(model, TrainConfig(steps=1)), DatasetStream(Sums(), batch_size=4, seed=3)
    listener = Listener()
    Run(trainer, stream, [stream.batch(0)], [CollapseWatch(), listener]).fit()
    assert not any(line.startswith("collapse: ") for line in listener.heard)


def test_a_callback_by_name_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_watch.py").write_text(
        "from protomamba import Callback\n"
        "class Watch(Callback):\n"
        "    name = 'watch'\n"
        "    def on_step(self, run, stats): run.note(f'seen {stats.step}')\n"
        "    def state_dict(self): return {'a': 1}\n"
        "    def load_state_dict(self, state): pass\n"
    )
    tokens = token_file(tmp_path)
    assert train(tmp_path / "run", tokens, "--steps", 2, "--callback", "my_watch:Watch") == 0
    assert "note: seen 2" in capsys.readouterr().out
    # A resume runs the user's code only where the user names it again.
    assert train(tmp_path / "run", tokens, "--steps", 1, "--resume", tmp_path / "run" / "latest.safetensors") == 0
    said = capsys.readouterr().out
    assert "seen" not in said and "state of the callback watch is dropped" in said
    assert train(tmp_path / "other", tokens, "--callback", "my_watch:Nothing") == 2
    assert "my_watch has no Nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_survives_a_kill_to_the_bit(tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "examples" / "own_dataset.py"), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    straight = start(tmp_path / "straight")
    cut = start(tmp_path / "cut")
    while not (tmp_path / "cut" / "latest.safetensors").exists() and cut.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert cut.returncode == -signal.SIGKILL
    again = start(tmp_path / "cut")
    for process in (straight, again):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "done after 8 validations" in out
    same_state(tmp_path / "cut" / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")
    assert json.loads((tmp_path / "cut" / "run_state.json").read_text())["step"] == 400
