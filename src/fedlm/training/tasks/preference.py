"""Preference alignment: a model learns which of two answers to prefer, or which single answers are wanted.

The reference is the policy at the start of the stage, constant over rounds. What it gives each answer is computed once
per silo, before training, and comes as facts of the examples (`REFERENCE`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import DataError
from fedlm.recipe.preference import PreferenceSpec
from fedlm.training.divergence import token_kl
from fedlm.training.forward import batch_nll, by_tokens, drops, model_device, sequence_nll
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.sequences import Example
from fedlm.training.tasks.base import REFERENCE, Held, Measured, Task
from fedlm.training.tasks.pairs import answered, mismatched, pair_of, prompt_of
from fedlm.training.tasks.preference_losses import kto_losses, pair_losses
from fedlm.training.tasks.preference_scores import Scored, judged_answers, pairs

KL_ROWS = 64
"""Held-out rows of a silo on which the KL is measured: it needs the whole distributions of two forward passes."""


BASELINE_TOKENS = 2048
"""Tokens per forward pass for KTO's baseline, of which nothing is kept."""


class Preference(Task):
    """DPO, IPO, KTO, ORPO or SimPO, as `recipe.preference` says.

    An example of a pair is (chosen, rejected); of ORPO (chosen, rejected, prompt), since its likelihood term is over
    prompt and chosen answer. KTO's is (answer, another row's answer to the same prompt) with the fact `wanted`; a pair
    gives two of them. What the answers begin with is computed once in a packed forward pass.
    """

    name = "preference"

    @property
    def spec(self) -> PreferenceSpec:
        assert self.recipe is not None, "preference alignment has settings"
        return self.recipe.preference

    @property
    def compares(self) -> bool:
        return self.spec.facts.reference

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        where, facts = row.get("row"), self._objective_of(row)
        if self.spec.loss == "kto":
            if row.get("desirable") is not None:
                turns = [{"role": "user", "content": row["prompt"]}]
                answers = [(row["response"], float(row["desirable"]))]
            else:
                turns, chosen, rejected = pair_of(row)
                answers = [(chosen, 1.0), (rejected, 0.0)]
            return [
                Example((answered(tokenizer, turns, text, max_length, where),), {**facts, "wanted": wanted})
                for text, wanted in answers
            ]
        turns, *texts = pair_of(row)
        pair = tuple(answered(tokenizer, turns, text, max_length, where) for text in texts)
        return [Example((*pair, prompt_of(pair[0])) if self.spec.loss == "orpo" else pair, facts)]

    def _objective_of(self, row: dict[str, Any]) -> dict[str, float]:
        """Which of several objectives a row belongs to, by its place among their sorted names."""
        if not self.spec.weights:
            return {}
        label = row.get("label")
        if label not in self.spec.weights:
            raise DataError(
                "the row's label is none of the objectives in `preference.weights`",
                where=row.get("row"),
                fix=f"give it a weight (weighed are {', '.join(sorted(self.spec.weights))}), or leave such rows out "
                "with the source's `where`",
            )
        return {"objective": float(sorted(self.spec.weights).index(label))}

    def together(self, examples: list[Example], silo: str = "") -> list[Example]:
        """Weights of objectives, and KTO's mismatched answers.

        Raises:
            DataError: KTO with answers of one verdict only.
        """
        if self.spec.loss == "kto" and silo:
            verdicts = {example.facts["wanted"] for example in examples}
            if len(verdicts) == 1:
                only = "wanted" if verdicts == {1.0} else "unwanted"
                raise DataError(
                    f"KTO needs wanted and unwanted answers in every silo, and this one has {only} ones only: it would "
                    f"learn to {'raise' if only == 'wanted' else 'lower'} whatever it is shown",
                    where=f"silo '{silo}'",
                    fix="give it rows of both kinds, pairs, or leave the silo out",
                )
        weights = self._weights(examples, silo)
        found = []
        for i, (example, weight) in enumerate(zip(examples, weights, strict=True)):
            facts = {name: value for name, value in example.facts.items() if name != "objective"}
            if self.spec.weights:
                facts["weight"] = weight
            sequences = example.sequences
            if self.spec.loss == "kto":  # half the rows away, so not an answer to the same prompt
                other = examples[(i + len(examples) // 2) % len(examples)].sequences[0]
                assert self.recipe is not None
                sequences = (sequences[0], mismatched(sequences[0], other, self.recipe.training.max_length))
            found.append(Example(sequences, facts, user=example.user))
        return found

    def _weights(self, examples: Sequence[Example], silo: str) -> list[float]:
        """What makes the mean over examples the weighted mean of the objectives' means: w_k N / (N_k sum of w).

        The sum is over the objectives that the silo has, so the size of its steps does not depend on which those are.
        """
        if not self.spec.weights:
            return [1.0] * len(examples)
        names, own = sorted(self.spec.weights), self.spec.silo_weights.get(silo, self.spec.weights)
        of = [names[int(example.facts["objective"])] for example in examples]
        counts = Counter(of)
        total = sum(own[name] for name in sorted(counts))
        return [own[name] / total * len(of) / counts[name] for name in of]

    def objective(self, tools: Tools) -> Objective:
        return PreferenceObjective(tools, self.spec)

    def measure(self, held: Held) -> Measured:
        examples: list[Example] = []
        rows = 0
        for row in held.rows:
            try:
                examples += self.examples(dict(row), held.tokenizer, held.max_length)
            except DataError:
                if not held.skip:
                    raise
            else:
                rows += 1
        if not rows:
            return Measured({"loss": (0.0, 0.0), "reward_accuracy": (0.0, 0.0), "reward_margin": (0.0, 0.0)})
        examples = self.together(examples)
        sequences = sequences_of(examples)
        sums, counts = sequence_nll(held.model, sequences, held.batch_tokens, packing=held.packing)
        shape = (len(examples), len(examples[0].sequences))
        reference = None
        if self.compares:
            assert held.reference_logps is not None, "a loss with a reference is measured with one"
            reference = held.reference_logps(sequences).reshape(shape)
        scored = Scored(examples, -sums.reshape(shape), counts.reshape(shape), reference)
        found = judged_answers if self.spec.loss == "kto" and rows == len(examples) else pairs
        figures, items = found(self.spec, scored)
        if held.reference is not None:
            answers = [example.sequences[0] for example in examples[:KL_ROWS]]
            figures["kl"] = token_kl(held.model, answers, held.reference, held.batch_tokens, packing=held.packing)
        return Measured(figures, items)


class PreferenceObjective(Objective):
    """A step's mean preference loss over its examples."""

    def __init__(self, tools: Tools, spec: PreferenceSpec) -> None:
        super().__init__(tools)
        self.preference = spec
        self.number, self.targets, self.baseline = 0, 0, 0.0

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        if drops(self.tools.model):
            self.tools.model.eval()  # a base with dropout: whole answers are compared, so no token may drop
        self.number = len(examples)
        if self.preference.loss == "orpo":
            self.targets = sum(e.sequences[0].targets + e.sequences[2].targets for e in examples)
        if self.preference.loss != "kto":
            return list(examples)
        # The baseline is one number for the step, whatever its forward passes.
        with torch.no_grad():
            sums = [
                self._sums([examples[i].sequences[1:] for i in run])[:, 0]
                for run in by_tokens([len(e.sequences[1]) for e in examples], BASELINE_TOKENS)
            ]
        ratios = -torch.cat(sums) - self._facts(examples, f"{REFERENCE}1")
        self.baseline = max(0.0, float(ratios.mean()))
        return [Example(example.sequences[:1], example.facts) for example in examples]

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        logps = -self._sums([example.sequences for example in part])
        lengths = torch.tensor([[s.targets for s in e.sequences] for e in part], device=logps.device)
        spec = self.preference
        if spec.loss == "kto":
            wanted = self._facts(part, "wanted") > 0.5
            losses, rewards = kto_losses(spec, logps[:, 0], self._facts(part, f"{REFERENCE}0"), wanted, self.baseline)
        else:
            reference = None
            if spec.facts.reference:
                reference = torch.stack([self._facts(part, f"{REFERENCE}{i}") for i in range(2)], 1)
            losses, rewards = pair_losses(spec, logps[:, :2], lengths[:, :2], reference)
            if spec.loss == "orpo":
                losses = losses - (logps[:, 0] + logps[:, 2]) * self.number / self.targets
            gaps = (rewards[:, 0] - rewards[:, 1]).detach()
            right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
            self.count("reward_accuracy", float(right.sum()), len(part))
            self.count("reward_margin", float(gaps.sum()), len(part))
        if "weight" in part[0].facts:
            losses = losses * self._facts(part, "weight")
        return losses, self.number

    def _sums(self, groups: Sequence[Sequence[Any]]) -> Tensor:
        """Negative log-likelihood of each sequence's targets [examples, width]."""
        flat = [sequence for group in groups for sequence in group]
        nll = batch_nll(self.tools.model, flat, self.tools.spec)
        owners = np.repeat(np.arange(len(flat)), [s.targets for s in flat])
        sums = torch.zeros(len(flat), dtype=nll.dtype, device=nll.device)
        return sums.index_add(0, torch.from_numpy(owners).to(nll.device), nll).view(len(groups), -1)

    def _facts(self, part: Sequence[Example], name: str) -> Tensor:
        values = [example.facts[name] for example in part]
        return torch.tensor(values, dtype=torch.float32, device=model_device(self.tools.model))
