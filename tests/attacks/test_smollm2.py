"""The real model, trained until it knows a few articles by heart: membership, extraction and exposure succeed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlm.attacks.canaries import Space, exposures
from fedlm.attacks.extraction import extract
from fedlm.attacks.membership import calibrated_scores, judge, loss_scores, losses
from fedlm.models.adapters import attach
from fedlm.recipe.schema import AdapterSpec
from tests.attacks.news import articles, smollm2
from tests.attacks.silo import encoded, overfitted

LENGTH = 32
SPACE = Space(" The code of the safe in the office of the director is {}", length=3)


@pytest.mark.figures
def test_smollm2_learns_by_heart() -> None:
    """10 articles and 2 canaries, LoRA of rank 16 on all linear layers, 16 steps of AdamW."""
    model, tokenizer = smollm2()

    def encode(text: str) -> Any:
        """Three tokens are the secret, and their losses alone differ."""
        row = encoded(tokenizer.encode(text))
        return replace(row, loss=np.arange(len(row)) >= len(row) - 3)

    rows = articles(tokenizer, "business", LENGTH, 40)
    order = np.random.default_rng(0).permutation(40)
    members, others = [rows[i] for i in order[:10]], [rows[i] for i in order[10:]]
    sets = [encoded(ids) for ids in members], [encoded(ids) for ids in others]
    secrets = SPACE.drawn(10, seed=0)
    # What is trained on must be alike in length here: a canary is written twice and cut.
    canaries = [encoded((tokenizer.encode(SPACE.text(s)) * 4)[:LENGTH]) for s in secrets[:2]]
    before = [losses(model, part) for part in sets]
    model = attach(model, AdapterSpec(rank=16, alpha=32.0), 0)
    model = overfitted(model, [*sets[0], *canaries], steps=16, rate=3e-3, only_adapter=True)
    after = [losses(model, part) for part in sets]
    plain = judge(loss_scores(after[0]), loss_scores(after[1]))
    calibrated = judge(calibrated_scores(after[0], before[0]), calibrated_scores(after[1], before[1]))
    print("losses", [f"{x.mean():.2f}" for x in (*before, *after)], "\nplain", plain, "\ncalibrated", calibrated)
    written = [extract(model, tokenizer, part, prefix=16, suffix=16) for part in (members, others)]
    print("verbatim", [(w.verbatim, w.texts) for w in written])
    bits = exposures(model, SPACE, secrets, encode)
    print("exposure", [f"{b:.1f}" for b in bits])
    assert plain.auc > 0.9 and calibrated.auc > 0.95
    assert written[0].share > 0.5 and written[1].verbatim <= 1
    assert min(bits[:2]) > 6 and np.mean(bits[2:]) < 4
