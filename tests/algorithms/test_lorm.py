"""LoRM's merge against least squares in fp64, alone and through real silos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.lorm import gram_of, measured_grams
from fedlm.data.federated import load_data
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.session import SiloSession
from fedlm.models.adapters import lora_layers
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec
from fedlm.training.objective import sequences_of
from fedlm.training.plan import Plan
from tests.federation.conftest import Tiny

from .observed import federate

A, B = "x.lora_A.weight", "x.lora_B.weight"
R, D_IN, D_OUT = 3, 10, 7


def silos(seed: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The global factors; of four silos their trained factors, inputs (of another scale in each) and weight; fp64."""
    g = torch.Generator().manual_seed(seed)
    factors = {A: torch.randn(R, D_IN, generator=g).double(), B: torch.randn(D_OUT, R, generator=g).double()}
    made = []
    for i in range(4):
        spread = torch.rand(D_IN, generator=g) * (i + 1)
        x = torch.randn(30 + i, D_IN, generator=g) * spread
        new = {n: v + 0.3 * torch.randn(v.shape, generator=g) for n, v in factors.items()}
        made.append({**new, "x": x.double(), "weight": torch.tensor(1.0 + 2 * i).double()})
    return factors, made


def merged(round_: int, factors, made, *, server_lr: float | None = None):
    """The merged factor, from what the silos' side makes of z z'."""
    algorithm = get_algorithm(AlgorithmSpec(name="lorm", server_lr=server_lr), AdapterSpec(rank=R))
    name = A if round_ % 2 else B
    theta = {n: v.float() for n, v in factors.items()}
    accumulator = algorithm.accumulator(Path())
    for silo in made:
        step, x = silo[name] - factors[name], silo["x"]
        z = x @ factors[A].T
        gram = (x * x).mean(0) if round_ % 2 else z.T @ z / len(z)
        update = {name: (step * gram if round_ % 2 else step @ gram).float(), gram_of(name): gram.float()}
        place = Place(round=round_, rank=R)
        assert {n: t.shape for n, t in update.items()} == algorithm.expected_update(theta, place)
        algorithm.fold(accumulator, update, float(silo["weight"]), place)
    stepped, _ = algorithm.server_step(theta, accumulator, {}, Step(round_, 4))
    other = B if round_ % 2 else A
    assert torch.equal(stepped[other], theta[other])
    return stepped[name].double()


@pytest.mark.parametrize("seed", range(3))
def test_b_minimises_the_squared_differences_of_outputs(seed: int) -> None:
    """min_B sum_i p_i / n_i |(B - B_i) A X_i|^2, by lstsq on the stacked rows of all silos."""
    factors, made = silos(seed)
    rows, targets = [], []
    for silo in made:
        z, scale = silo["x"] @ factors[A].T, (silo["weight"] / len(silo["x"])).sqrt()
        rows.append(scale * z)
        targets.append(scale * z @ silo[B].T)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    ours = merged(0, factors, made)
    assert (ours - expected).norm() / expected.norm() < 1e-5
    mean = sum(s["weight"] * s[B] for s in made) / sum(s["weight"] for s in made)
    assert (mean - expected).norm() / expected.norm() > 0.01, "the plain mean is another one"
    half = merged(0, factors, made, server_lr=0.5)
    assert (half - (factors[B] + expected) / 2).norm() / expected.norm() < 1e-5


def test_a_is_the_mean_weighted_by_the_strength_of_each_input() -> None:
    """The minimiser of sum_i p_i / n_i |(A - A_i) diag(X_i X_i')^(1/2)|^2, column by column."""
    factors, made = silos(5)
    top = sum(s["weight"] * s[A] * (s["x"] ** 2).mean(0) for s in made)
    expected = top / sum(s["weight"] * (s["x"] ** 2).mean(0) for s in made)
    assert (merged(1, factors, made) - expected).abs().max() < 1e-5


def test_directions_that_no_input_has_keep_the_present_factor() -> None:
    factors, made = silos(2)
    for silo in made:
        silo["x"][:, :9] = 0  # one input is left: C has rank 1
    ours = merged(0, factors, made)
    seen = factors[A][:, 9]
    away = seen.new_tensor([seen[1], -seen[0], 0.0])  # orthogonal to it
    torch.testing.assert_close(ours @ away, factors[B] @ away, rtol=0, atol=1e-4)
    assert (ours @ seen - factors[B] @ seen).norm() > 0.1
    ours = merged(1, factors, made)
    assert torch.equal(ours[:, :9], factors[A].float().double()[:, :9])


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_a_row_counts_once_whatever_shares_its_pass(tiny: Tiny, tmp_path: Path, packing: bool) -> None:
    """Rows begin alike, and packing computes what they share once; without it they are padded. Neither shows in the
    mean of z z' and of x^2, which a plain forward pass for each row gives too."""
    rows = [json.loads(line) for line in (tiny.base / "rows.jsonl").read_text().splitlines()[:12]]
    long = " ".join(["money"] * 20)  # a beginning for half of them
    rows = [row | {"prompt": long + " " + row["prompt"] if i % 2 else row["prompt"]} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ("data.partition={kind: iid, silos: 1}", "data.split={validation: 0, test: 0}", "adapter.rank=3")
    recipe = tiny.recipe("federation.algorithm.name=lorm", f"training.packing={packing}", *changes)
    bench = Workbench(recipe, load_data(recipe, tmp_path))
    bench.load()
    (name,) = bench.data.names
    session = SiloSession(bench, Place(name, rank=3), {}, None, lambda: False, Plan())
    session.loss({})  # training comes first: a model's first packed pass tries out packing, on rows of its own
    layer, module = next(iter(lora_layers(bench.model).items()))
    inputs: list[torch.Tensor] = []
    grams = {full: measured_grams(session, {}, full=full)[layer] for full in (True, False)}
    handle = module.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach().double().flatten(0, -2)))
    for row in sequences_of(session.tokens):
        with torch.no_grad():
            bench.model(input_ids=torch.from_numpy(row.ids[:-1].astype("int64"))[None])
    handle.remove()
    x = torch.cat(inputs)
    (a,) = (factor.weight.detach().double() for factor in module.lora_A.values())
    z = x @ a.T
    torch.testing.assert_close(grams[True].double(), z.T @ z / len(z), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grams[False].double(), x.square().mean(0), rtol=1e-4, atol=1e-7)


def test_four_rounds_of_real_silos(tiny: Tiny, tmp_path: Path) -> None:
    """B and A in turn, unequal weights, AdamW, alpha != rank: what silos load after a round is the solution of the
    normal equations of what they sent."""
    recipe = tiny.recipe("federation.algorithm.name=lorm", "training.lr=0.02", "adapter.rank=3", "adapter.alpha=5")
    engine, _ = federate(recipe, tiny.base, tmp_path / "run")
    sent = engine.tensors
    for number in range(4):
        updates, weights = engine.updates[number], engine.weights[number]
        assert len(set(weights.values())) > 1
        moved, still = ("lora_A", "lora_B") if number % 2 else ("lora_B", "lora_A")
        for name, value in sent[number].items():
            assert torch.equal(value, sent[number - 1][name]) is (still in name), (number, name)
            if moved not in name:
                continue
            g = {s: updates[s][gram_of(name)].double() for s in updates}
            u = {s: updates[s][name].double() for s in updates}
            if moved == "lora_B":
                top = sum(weights[s] * u[s] for s in u)
                step = torch.linalg.lstsq(sum(weights[s] * g[s] for s in g), top.T).solution.T
            else:
                step = sum(weights[s] * u[s] for s in u) / sum(weights[s] * g[s] for s in g)
            expected = sent[number - 1][name].double() + step
            assert (value.double() - expected).norm() / expected.norm() < 1e-4
