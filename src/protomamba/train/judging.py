"""How good a model is by the measures of its task: ranks of items beside baselines, a confusion matrix, bits a byte."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from protomamba.data.baselines import Baselines
from protomamba.data.sequences import SequenceSet
from protomamba.data.source import DataInfo, Source
from protomamba.data.windows import Batch
from protomamba.model.heads.ranking import ranking_figures, ranks_of_targets
from protomamba.model.sequence_model import SequenceModel


@dataclass
class Judgement:
    """What was found over some batches; `ranking` and `classification` are fields of lines of metrics.jsonl."""

    ranking: dict[str, Any] = field(default_factory=dict)
    classification: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> dict[str, dict[str, Any]]:
        """The events of metrics.jsonl by name (docs/report.md)."""
        return {name: found for name, found in vars(self).items() if found}


@torch.no_grad()
def judge(model: SequenceModel, batches: Iterable[Batch], info: DataInfo, training: Source | None) -> Judgement:
    """Judge a model on the batches of a part of its data, of which `info` says what it is.

    training: what the baselines of item sequences are counted on; None leaves them out.
    """
    was_training = model.training
    model.eval()
    try:
        if info.n_class is not None:
            return Judgement(classification=_classify(model, batches, info))
        if info.preset == "events":
            return Judgement(ranking=_rank(model, batches, info, training))
        return Judgement()
    finally:
        model.train(was_training)


def _rank(model: SequenceModel, batches: Iterable[Batch], info: DataInfo, training: Source | None) -> dict[str, Any]:
    ranks, previous, targets = [], [], []
    for batch in batches:
        z_BLD, _ = model.features(batch.tokens_BL, reset_BL=batch.reset_BL)
        wanted_BL = batch.targets_BL >= 0
        ranks.append(ranks_of_targets(model.head, z_BLD, batch.targets_BL, info.reserved))
        previous.append(batch.tokens_BL[wanted_BL])
        targets.append(batch.targets_BL[wanted_BL])
    found = torch.cat(ranks) if ranks else torch.empty(0)
    figures = {
        "rows": len(found),
        "items": model.config.classes - len(info.reserved),
        "figures": ranking_figures(found),
    }
    if isinstance(training, SequenceSet) and len(found):
        before, wanted = (torch.cat(each).numpy().astype(np.int64) for each in (previous, targets))
        baselines = Baselines.of(training).ranks(before, wanted)
        figures["baselines"] = {name: ranking_figures(torch.from_numpy(each)) for name, each in baselines.items()}
    return figures


def _classify(model: SequenceModel, batches: Iterable[Batch], info: DataInfo) -> dict[str, Any]:
    classes = model.config.classes
    confusion_CC = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in batches:
        z_BLD, _ = model.features(batch.tokens_BL, reset_BL=batch.reset_BL)
        wanted_BL = batch.targets_BL >= 0
        targets_T, predicted_T = batch.targets_BL[wanted_BL], model.head.predict(z_BLD[wanted_BL])
        pairs_T = targets_T * classes + predicted_T
        confusion_CC += torch.bincount(pairs_T, minlength=classes * classes).view(classes, classes)
    names = list(info.class_names) or [str(number) for number in range(classes)]
    return {"classes": names, "confusion": confusion_CC.tolist()}
