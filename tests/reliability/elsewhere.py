"""Which tests of other folders show a promise too. Apart from the plugin, which pytest has to import first."""

from __future__ import annotations

ELSEWHERE = {
    "tests/checkpoint/test_checkpoint_faults.py": 2,
    "tests/checkpoint/test_checkpoint_damage.py": 3,
    "tests/train/test_signals.py": 5,
    "tests/test_bad_input.py": 7,
    "tests/data/test_prefetch.py": 8,
    "tests/checkpoint/test_rundir_lock.py": 9,
}
