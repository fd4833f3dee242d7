"""What the user gave is explicit, survives every rewrite, and stands above presets."""

from __future__ import annotations

import pytest

from protomamba import ModelConfig, TrainConfig
from protomamba.errors import ConfigError
from protomamba.run_config import PRESETS, RunConfig


def test_what_was_given_survives_a_rewrite_and_the_rewrite_is_not_given() -> None:
    config = RunConfig(d_model=96, steps=7).replace(vocab_size=13, d_model=64)
    assert config.given == {"d_model", "steps"}
    assert (config.d_model, config.vocab_size) == (64, 13)


def test_of_a_recorded_configuration_nothing_is_given() -> None:
    assert RunConfig.recorded(RunConfig(steps=7).to_json()).given == frozenset()


def test_a_preset_stands_below_what_is_given_and_is_not_given() -> None:
    config = RunConfig(preset="plain", seq_len=32)
    assert config.given == {"preset", "seq_len"}
    assert (config.bp_cadence_steps, config.final_layers, config.freeze) == (1, config.base_layers, "none")
    reference = RunConfig(bp_cadence_steps=4)
    assert (reference.bp_cadence_steps, reference.final_layers, reference.freeze) == (4, 6, "first:2")
    assert RunConfig.recorded(reference.to_json()) == reference


def test_the_librarys_defaults_are_plain() -> None:
    plain = RunConfig(preset="plain").project(TrainConfig)
    assert plain == TrainConfig() and TrainConfig().bp_cadence_steps == 1 and TrainConfig().ff_lr == 0


def test_presets_name_fields_with_values_in_bounds() -> None:
    for name, values in PRESETS.items():
        assert RunConfig(preset=name).replace(**values) == RunConfig(preset=name)


def test_a_preset_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--preset 'pain': expected one of reference, plain"):
        RunConfig(preset="pain")


def test_configs_are_equal_by_their_values_however_they_came_to_them() -> None:
    assert ModelConfig(vocab_size=5) == ModelConfig(vocab_size=5, d_model=512)
    assert ModelConfig(vocab_size=5) != ModelConfig(vocab_size=6)
