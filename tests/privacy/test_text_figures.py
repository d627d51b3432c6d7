"""What is left of real questions under noise on text, as docs/privacy.md has it; with `pytest -m figures -s`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedlm.privacy.stream import SecretStream
from fedlm.privacy.text import perturbed, uniform
from fedlm.recipe.load import load_recipe
from fedlm.recipe.starters import read_template

EPSILONS = (10, 20, 30, 40, 50, 60)


@pytest.mark.figures
def test_tokens_that_stay_by_epsilon(tmp_path: Path) -> None:
    from fedlm.data.cache import table_of
    from fedlm.data.sources import locate
    from fedlm.federation.silo.perturbed import space_of
    from fedlm.models.load import load_base, load_tokenizer

    (tmp_path / "recipe.yaml").write_text(read_template("in-context"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    bench: Any = SimpleNamespace(model=load_base(recipe.model), tokenizer=load_tokenizer(recipe.model))
    rows, space = table_of(locate(recipe.data.sources[0], tmp_path), "skip", None).dataset, space_of(bench)
    encoded = [bench.tokenizer.encode(rows[i]["question"], add_special_tokens=False) for i in range(20)]
    tokens = np.concatenate([np.asarray(ids, np.int64) for ids in encoded])
    kept = {}
    for epsilon in EPSILONS:
        draws = uniform(SecretStream(bytes(32), "figures", epsilon), len(tokens))
        kept[epsilon] = float((perturbed(tokens, draws, space, float(epsilon)) == tokens).mean())
        print(f"epsilon {epsilon} a token: {kept[epsilon]:.1%} of {len(tokens)} tokens stay")
    assert kept[20] < 0.05 and 0.2 < kept[30] < 0.35 and 0.75 < kept[40] < 0.9 and kept[60] > 0.97
