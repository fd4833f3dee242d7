"""`protomamba parity transformers`: weights there and back, and the same numbers on both sides.

Everything is random and local: nothing is downloaded, and transformers is set to offline.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from protomamba.checkpoint.transformers_folder import (
    read_transformers_folder,
    transformers_names,
    write_transformers_folder,
)
from protomamba.config import ModelConfig, Sampling
from protomamba.decode import generate
from protomamba.kernels.closeness import rms_ratio
from protomamba.model.sequence_model import SequenceModel
from protomamba.parity.report import Report, max_abs, missing, versions

Model = TypeVar("Model", bound=nn.Module)
ABSOLUTE, RELATIVE = 1e-5, 1e-4  # of logits and loss; of gradients, as rms_ratio of each parameter
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 70, 5, 200
# dt_rank is not the one transformers would derive from the width, and no size is a multiple of a vector.
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 44,
    "n_layer": 3,
    "d_state": 7,
    "d_conv": 3,
    "expand": 2,
    "dt_rank": 5,
}


def run(seed: int = 0) -> Report:
    """A random MambaForCausalLM into ours and ours into a folder for transformers, with softmax and hpn heads.

    Raises UserError where transformers cannot be imported.
    """
    transformers = import_transformers()
    report = Report("transformers", facts={**versions("torch", "transformers"), "seed": str(seed)})
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind in ("untied", "tied"):
            check_import(report, transformers, kind == "tied", Path(scratch) / f"theirs-{kind}")
        for head in ("softmax", "hpn"):
            check_export(report, transformers, head, Path(scratch) / f"ours-{head}", seed)
    return report


def import_transformers() -> Any:
    """transformers, offline and quiet."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # read when it is imported
    try:
        import transformers
    except ImportError as error:
        raise missing("transformers", "parity transformers", error) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_import(report: Report, transformers: Any, tied: bool, folder: Path) -> None:
    """Theirs, random, saved by them and read by us: logits, loss, every gradient and greedy decoding."""
    theirs = scattered(transformers.MambaForCausalLM(their_config(transformers, tied))).eval()
    theirs.save_pretrained(folder, max_shard_size="60KB")  # several files and an index
    values, state = read_transformers_folder(folder)
    ours = SequenceModel(ModelConfig(**values))
    ours.load_state_dict(state)
    label = f"import, {'tied' if tied else 'untied'}"
    ids_BL = torch.randint(values["vocab_size"], (BATCH, LENGTH))
    targets_BL = torch.cat([ids_BL[:, 1:], torch.full((BATCH, 1), -100)], dim=1)
    output = theirs(ids_BL, labels=ids_BL)  # they shift the labels themselves
    loss = ours(ids_BL, targets_BL)
    report.check(f"{label}: logits", max_abs(ours.scores(ids_BL), output.logits.detach()), ABSOLUTE)
    report.check(f"{label}: loss", max_abs(loss.detach(), output.loss.detach()), ABSOLUTE)
    output.loss.backward()
    loss.backward()
    report.worst_of(f"{label}: gradients", gradient_errors(ours, theirs), RELATIVE)
    check_greedy(report, label, ours, theirs)


def check_export(report: Report, transformers: Any, head: str, folder: Path, seed: int) -> None:
    """Ours, random, written by us and loaded by `from_pretrained`: logits (of the softmax head) and greedy decoding."""
    ours = scattered(SequenceModel(ModelConfig(**SHAPE, head=head), seed=seed))
    write_transformers_folder(folder, ours.config, ours.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if head == "softmax":
        ids_BL = torch.randint(ours.config.vocab_size, (BATCH, LENGTH))
        report.check(f"export, {head}: logits", max_abs(ours.scores(ids_BL), theirs(ids_BL).logits.detach()), ABSOLUTE)
    check_greedy(report, f"export, {head}", ours, theirs)


def check_greedy(report: Report, label: str, ours: SequenceModel, theirs: Any) -> None:
    """Count the tokens of two greedy continuations that differ; none may."""
    prompt_BL = torch.randint(ours.config.vocab_size, (BATCH, PROMPT))
    found_BT = torch.tensor(generate(ours, prompt_BL.tolist(), Sampling(max_tokens=NEW_TOKENS, temperature=0)))
    with torch.no_grad():
        expected_BT = theirs.generate(
            prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=NEW_TOKENS, do_sample=False
        )[:, PROMPT:]
    different = int((found_BT != expected_BT).sum())
    note = f"{BATCH} x {NEW_TOKENS} tokens, {len(expected_BT.unique())} different ones"
    report.check(f"{label}: greedy tokens that differ", different, 0, note)


def gradient_errors(ours: SequenceModel, theirs: nn.Module) -> dict[str, float]:
    names, gradients = transformers_names(ours.config), dict(theirs.named_parameters())
    return {
        name: rms_ratio(_gradient(parameter), _gradient(gradients[names[name]]))
        for name, parameter in ours.named_parameters()
    }


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter got no gradient")
    return parameter.grad


def scattered(model: Model) -> Model:
    """The model with noise on every parameter, so that no bias is zero and no norm is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def their_config(transformers: Any, tied: bool) -> Any:
    """SHAPE as their configuration; no token ends a sequence."""
    return transformers.MambaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["d_model"],
        num_hidden_layers=SHAPE["n_layer"],
        state_size=SHAPE["d_state"],
        conv_kernel=SHAPE["d_conv"],
        expand=SHAPE["expand"],
        time_step_rank=SHAPE["dt_rank"],
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
