"""Parts by name and their settings: one registration, flags that fill what declares them, options that win."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from protomamba import PLAIN_CALL, ConfigError, ForwardContext, Mixer, MixerOutput, ModelConfig, Schema, SequenceModel
from protomamba.config import PartFields, parse_options, stack_kinds
from protomamba.model.heads import head
from protomamba.model.inputs import input_part
from protomamba.model.mixers import mixer
from protomamba.model.registry import idle_settings, merged_options, with_settings

OWN = f"{__name__}:Gate"


class Gate(Mixer):
    """A layer of a user's own, with a setting of its own and two of the flags' names, one by another default."""

    class Config(Schema):
        d_state: int = 7
        expand: int = 2
        slope: float = Field(1.0, gt=0)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        return MixerOutput(self.out_proj(x_BLD * self.options.slope))


def config(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 11, "d_model": 8, "n_layer": 2, **fields})


def own(**fields: Any) -> dict[str, Any]:
    """The settings of a model of Gates."""
    options: Schema = SequenceModel(config(layer=OWN, **fields)).layers[0].mixer.options  # type: ignore[union-attr, assignment]
    return options.model_dump()


def test_every_sort_of_part_is_registered_under_the_value_of_its_flag() -> None:
    assert {"mamba", "compact", "attention"} <= mixer.classes.keys()
    assert {"hpn", "softmax"} <= head.classes.keys() and {"tokens", "vector"} <= input_part.classes.keys()
    with pytest.raises(ValueError, match="identifier that no other layer has"):
        mixer("mamba")(Gate)


def test_a_flag_that_is_given_fills_the_field_of_its_name_in_a_part_and_the_parts_own_default_stands_else() -> None:
    assert own() == {"d_state": 7, "expand": 2, "slope": 1.0}
    assert own(d_state=16)["d_state"] == 16 and own(expand=3)["expand"] == 3


def test_options_win_over_flags_and_those_of_a_kind_over_those_of_all() -> None:
    assert own(d_state=5, layer_options={"d_state": 4, "slope": "0.5"}) == {"d_state": 4, "expand": 2, "slope": 0.5}
    assert own(layer_options={OWN: {"slope": 3}, "slope": 2})["slope"] == 3.0


def test_words_of_the_command_line_are_options() -> None:
    words = ["slope=2", f"{OWN}.d_state=9", "slope=4"]
    assert parse_options(words) == {"slope": "4", OWN: {"d_state": "9"}}
    assert own(layer_options=words) == {"d_state": 9, "expand": 2, "slope": 4.0}
    with pytest.raises(ConfigError, match=r"expected KEY=VALUE or KIND\.KEY=VALUE"):
        config(layer_options=["slope"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer_options": {"d_stat": 3}}, "--layer-option d_stat: mamba has no such setting .did you mean d_state?"),
        ({"layer_options": {"mambo": {"d_state": 3}}}, "the model has no mambo .did you mean mamba?"),
        ({"layer_options": {"compact": {"d_state": 3}}}, "the model has no compact"),
        ({"head_options": {"prototype": "fixed"}}, "hpn has no such setting .did you mean prototypes?"),
        ({"head": "softmax", "head_options": {"prototypes": "fixed"}}, "it has sample, tie_embedding"),
        ({"layer": f"{OWN}s"}, f"has no {OWN.partition(':')[2]}s .did you mean {OWN.partition(':')[2]}?"),
        ({"layer_options": {"expand": 99}}, "--layer-option of mamba: --expand 99: expected an integer >= 1 and <= 16"),
    ],
)
def test_an_option_that_no_part_has_is_an_error_with_the_nearest_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SequenceModel(config(**fields))


def test_a_models_configuration_says_every_setting_and_builds_the_same_again() -> None:
    first = SequenceModel(config(layer=OWN, layer_options={"slope": 2.0}))
    assert first.config.layer_options == {OWN: {"d_state": 7, "slope": 2.0}}
    again = SequenceModel(ModelConfig(**first.config.model_dump(mode="json")))  # as from a checkpoint
    assert again.config == first.config and own(layer_options={"slope": 2.0})["d_state"] == 7


def test_a_setting_with_a_flag_of_its_own_stands_under_that_name_wherever_it_came_from() -> None:
    resolved = with_settings(config(layer_options={"expand": 3}, head="softmax", head_options={"tie_embedding": "1"}))
    assert resolved.expand == 3 and resolved.tie_embedding is True
    assert resolved.layer_options == {} and resolved.head_options == {"softmax": {"sample": 0}}
    mixed = with_settings(config(layers="mamba,compact", layer_options={"compact": {"d_state": 4}}))
    assert mixed.layer_options == {"mamba": {"d_state": 16}, "compact": {"d_state": 4}}


def test_flags_nobody_reads_are_known_with_those_who_would() -> None:
    idle = idle_settings(config(layer="compact", head="softmax"))
    assert idle == {"expand": ["mamba"], "dt_rank": ["mamba"], "prototypes": ["hpn"], "separation": ["hpn"]}
    assert idle_settings(config(layers="mamba,compact")) == {"tie_embedding": ["softmax"]}
    assert idle_settings(config()).keys() <= PartFields.model_fields.keys()


def test_options_given_over_a_checkpoints() -> None:
    recorded = {"attention": {"n_head": 2, "rope_theta": 1e4}}
    assert merged_options(recorded, {"n_head": 4}) == {"n_head": 4, "attention": {"n_head": 4, "rope_theta": 1e4}}
    assert merged_options(recorded, {"attention": {"n_head": 4}})["attention"] == {"n_head": 4, "rope_theta": 1e4}


def test_a_pattern_counts_final_places() -> None:
    assert stack_kinds("mamba*2,attention", 7) == ["mamba", "mamba", "attention"] * 2 + ["mamba"]
    assert stack_kinds("mamba", 0) == [] and stack_kinds(" a , b*1", 2) == ["a", "b"]
    for wrong in ("", "mamba*", "mamba*0", "mamba,,compact", "*3"):
        with pytest.raises(ConfigError, match=r"expected KIND\[\*N\]"):
            stack_kinds(wrong, 3)


def test_the_weights_of_a_seed_are_those_of_0_1() -> None:
    model = SequenceModel(config(), seed=5)
    torch.manual_seed(5)
    table = nn.Embedding(11, 8)
    nn.init.normal_(table.weight, std=0.02)
    assert torch.equal(model.embedding.weight, table.weight)  # type: ignore[arg-type]
