"""The report's two sentences: what was done, and whether it helped. Claims go no further than the intervals."""

from __future__ import annotations

from typing import Any

from fedlm.report.facts import Estimate, RunFacts, estimate, metric_keys
from fedlm.report.format import higher_is_better, is_number, metric, metric_name, plural

ALGORITHMS = {
    "fedavg": "federated averaging",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fedavgm": "federated averaging with server momentum",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "fednova": "FedNova",
    "feddyn": "FedDyn",
    "ditto": "Ditto",
    "feddpa": "FedDPA",
    "fedrep": "FedRep",
    "fedbiscuit": "FedBiscuit",
    "ifca": "IFCA",
    "fedit": "FedIT",
    "ffa-lora": "FFA-LoRA",
    "rolora": "RoLoRA",
    "fedsa-lora": "FedSA-LoRA",
    "fedrot-lora": "FedRot-LoRA",
    "lora-fair": "LoRA-FAIR",
    "fedsvd": "FedSVD",
    "fed-sb": "Fed-SB",
    "lora-xs": "LoRA-XS",
    "fedex-lora": "FedEx-LoRA",
    "flora": "FLoRA",
    "flexlora": "FlexLoRA",
    "hetlora": "HetLoRA",
    "frlora": "FRLoRA",
    "lorm": "LoRM",
    "task-arithmetic": "task arithmetic",
    "ties": "TIES merging",
    "fedasync": "FedAsync",
    "fedbuff": "FedBuff",
    "diloco": "DiLoCo",
    "streaming-diloco": "Streaming DiLoCo",
    "eager-diloco": "eager DiLoCo",
    "delayed-nesterov": "delayed Nesterov",
    "fedmezo": "FedMeZO",
    "fedkseed": "FedKSeed",
    "feedsign": "FeedSign",
    "ferret": "Ferret",
}


def model_name(source: str) -> str:
    """The telling part of a model's source: the file in a package, the hub name, or the folder."""
    last = source.split("!")[-1].split(":", 1)[-1] if "!" in source else source.split(":", 1)[-1]
    return last.rstrip("/").split("/")[-1] or source


def federation_sentence(facts: RunFacts) -> str:
    """What was done, in one sentence."""
    recipe = facts.recipe
    model = model_name(str((recipe.get("model") or {}).get("source", "a language model")))
    adapter: dict[str, Any] = recipe.get("adapter") or {}
    kind = str(adapter.get("kind", "lora"))
    trained = {"full": "all weights", "ia3": "an IA3 adapter"}.get(
        kind, f"a LoRA adapter of rank {adapter.get('rank', 8)}"
    )
    algorithm = ((recipe.get("federation") or {}).get("algorithm") or {}).get("name", "fedavg")
    how = ALGORITHMS.get(str(algorithm), str(algorithm))
    silos, rounds = len(facts.silos()), len(facts.rounds)
    who = plural(silos, "silo") if silos else "Silos"
    sentence = f"{who} fine-tuned {trained} of {model} together"
    planned = facts.rounds_planned
    if rounds:
        of = f" (of {planned} planned)" if planned and planned != rounds else ""
        sentence += f" in {plural(rounds, 'round')}{of}"
    elif planned:
        sentence += f" in {plural(planned, 'round')}"
    names = guard_names(facts)
    guards = " and then ".join(f"`{name}`" for name in names if name != "mask")
    hidden = ", each hidden in the sum of all (secure aggregation)" if masked(facts) else ""
    if start := (facts.run.get("start") or {}).get("run"):
        sentence += f", from where the run {start} had ended,"
    compressed = f", compressed by {guards} on the way up" if guards else ""
    promise = ""
    if privacy := recipe.get("privacy"):
        whose = {"example": "each row", "user": "all rows of a person in a silo", "silo": "each silo"}[privacy["unit"]]
        promise = (
            f" Noise protects {whose} (differential privacy: epsilon {privacy['epsilon']:g} at delta "
            f"{privacy['delta']:g}); `fedlm audit` says what that covers."
        )
    return f"{sentence} of {how}. They exchanged model updates{compressed}{hidden}, never text.{promise}"


def guard_names(facts: RunFacts) -> list[str]:
    return [str(guard.get("name")) for guard in facts.recipe.get("guards") or []]


def masked(facts: RunFacts) -> bool:
    """Whether updates were seen only in sums."""
    return "mask" in guard_names(facts)


def withheld(facts: RunFacts) -> bool:
    """Whether no figure of a silo's rows left it."""
    return (facts.recipe.get("privacy") or {}).get("figures") == "withheld"


def rows_kept(facts: RunFacts) -> bool:
    """Whether not even their number left: of a silo, or a person, that is protected as a whole, it would tell."""
    return withheld(facts) and facts.recipe["privacy"]["unit"] != "example"


def verdict(facts: RunFacts) -> str:
    """Whether it helped, in a sentence or two."""
    judged = (facts.comparison.get("verdict") or {}).get("sentence")
    if judged:
        return str(judged)
    before, after, rows = facts.before_after()
    both = metric_keys([before, after]) if before and after else []
    if not both:
        if facts.run.get("status") in ("interrupted", "running"):
            return f"The run is not finished. Continue it with: fedlm run --resume {facts.folder}"
        if withheld(facts):
            return (
                "Nothing was measured: under this recipe's `privacy` no figure of rows leaves silos. See `fedlm eval`."
            )
        return "Nothing was measured on held-out text."
    key = both[0]
    first, last = estimate(before, key), estimate(after, key)
    assert first is not None and last is not None
    change = _change(first, last, key)
    verb = {"better": "improved", "worse": "got worse", "unchanged": "stayed the same,"}.get(change, "went")
    values = f"from {metric(key, first.value)} to {metric(key, last.value)}"
    text = f"On held-out {rows} rows, {metric_name(key)} {verb} {values}"
    text += ", a difference within the 95 % interval." if change == "not clearly different" else "."
    if facts.run.get("status") == "interrupted":
        text += f" The run was interrupted; continue it with: fedlm run --resume {facts.folder}"
    return text


def _change(first: Estimate, last: Estimate, key: str) -> str:
    """`better`, `worse`, or `not clearly different` where either value lies in the other's interval."""
    for a, b in ((first, last), (last, first)):
        if is_number(a.low) and is_number(a.high) and a.low <= b.value <= a.high:
            return "not clearly different"
    if first.value == last.value:
        return "unchanged"
    return "better" if (last.value > first.value) == higher_is_better(key) else "worse"
