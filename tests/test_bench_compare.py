"""make bench-compare: pairs of measurements, an interval of their ratio, and what goes wrong with another commit."""

from __future__ import annotations

import math
import random
import subprocess
from pathlib import Path

import pytest
import torch

from protomamba.bench import child, compare
from protomamba.bench.shapes import Shape
from protomamba.errors import ConfigError, UserError

SOURCE = Path(compare.__file__).resolve().parents[2]
TINY = compare.task_of(Shape("tiny", 2, 8, 16, 1, classes=20), "fp32", 1, "wall")


@pytest.mark.parametrize(("n", "ranks"), [(6, (0, 5)), (9, (1, 7)), (30, (9, 20)), (100, (39, 60))])
def test_the_interval_is_that_of_the_order_statistics(n: int, ranks: tuple[int, int]) -> None:
    """Against the tables of the sign test: 30 values give the 10th and 21st."""
    assert compare.interval(list(map(float, range(n)))) == ranks


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2_000):
        low, high = compare.interval(sorted(draw.expovariate(1.0) for _ in range(30)))
        held += low <= math.log(2) <= high
    assert 0.94 < held / 2_000 < 0.98


def test_two_builds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, source: Path, task: object) -> None:
            self.name, self.seconds = source.name, 0.1 if source.name == "old" else 0.2

        def step(self, count: int) -> float:
            order.append(self.name)
            return self.seconds * count

        def close(self) -> None:
            order.append(f"{self.name} closed")

    monkeypatch.setattr(compare, "Build", Fake)
    found = compare.compare(Path("old"), Path("new"), {}, pairs=6)
    assert order == ["old", "new"] + ["new", "old", "old", "new"] * 3 + ["new closed", "old closed"]
    assert found == pytest.approx((100.0, 200.0, 2.0, 2.0, 2.0))


def test_a_build_steps_in_a_process_of_its_own() -> None:
    found = compare.compare(SOURCE, SOURCE, TINY, pairs=6)
    assert found.old_ms > 0 and found.new_ms > 0 and found.low <= found.ratio <= found.high


def test_a_build_that_fails_says_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "protomamba").mkdir()
    (tmp_path / "protomamba" / "__init__.py").write_text("")
    with pytest.raises(UserError, match=f"the process of {tmp_path} ended with 1; its error is above"):
        compare.Build(tmp_path, TINY)
    assert "no attribute 'SequenceModel'" in capfd.readouterr().err


def test_a_commit_is_checked_out_beside_and_taken_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a").write_text("old")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "src" / "a").write_text("new")
    built: list[Path] = []
    monkeypatch.setattr(compare, "build_kernels", built.append)
    with compare.checkout(tmp_path, "HEAD") as source:
        assert (source / "a").read_text() == "old" and built == [source.parent]
    assert not source.exists()
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


def test_a_folder_is_taken_as_it_is_built() -> None:
    with compare.checkout(Path("elsewhere"), str(SOURCE.parent)) as source:
        assert source == SOURCE


def test_an_unknown_commit_and_a_missing_program_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["no-such-commit", "--shapes", "S"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="no-such-program cannot be run: No such file"):
        compare.run(["no-such-program"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cmake is not on the path"):
        compare.build_kernels(tmp_path)


def test_too_few_pairs_have_no_interval() -> None:
    with pytest.raises(ConfigError, match="--pairs 5: expected at least 6"):
        compare.parse(["HEAD", "--pairs", "5"])


def test_tokens_have_the_frequencies_of_text() -> None:
    tokens_BL, targets_BL = child.batch(50, 400, 100)
    assert torch.equal(tokens_BL[:, 1:], targets_BL[:, :-1]) and torch.equal(tokens_BL, child.batch(50, 400, 100)[0])
    counts = torch.bincount(targets_BL.flatten(), minlength=100) / targets_BL.numel()
    harmonic = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 10):
        assert float(counts[rank - 1]) == pytest.approx(1 / rank / harmonic, rel=0.15)
