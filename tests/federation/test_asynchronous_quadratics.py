"""An asynchronous federation of silos that learn, one of them ten times slower: quadratics with a closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedlm.algorithms.fedbuff import staleness_weight
from fedlm.messages import Failure, Reply, Request
from tests.federation.conftest import Tiny
from tests.federation.test_asynchronous import STEPS, Paced, told
from tests.federation.test_coordinator import Started, no_model, train_reply  # noqa: F401  (a fixture)

SECONDS = {"s0": 1.0, "s1": 1.1, "s2": 1.21, "s3": 10.0}
RATE = 0.05


class Learners(Paced):
    """Silo i takes STEPS steps of gradient descent on (w - b_i)' diag(a_i) (w - b_i) / 2; what it wants of w[2] is far
    from what the others want, so that its share in the result shows."""

    def __init__(self) -> None:
        super().__init__(4)
        generator = torch.Generator().manual_seed(0)
        self.a = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.5
        self.b = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.b[3, 2] = 20.0

    def answer(self, request: Request) -> Reply | Failure:
        if request.verb != "train":
            return super().answer(request)
        i, start = self.names.index(request.silo), request.tensors["w"].double()
        w = start
        for _ in range(STEPS):
            w = w - RATE * self.a[i] * (w - self.b[i])
        reply = train_reply(request, 0.0)
        reply.tensors["w"] = (w - start).float()  # type: ignore[index]
        return reply

    def settled(self, share: dict[str, float]) -> torch.Tensor:
        """Where sum_i share_i (I - (I - rate a_i)^steps) (b_i - w) = 0: the mean step of a round is nothing."""
        pull = torch.stack([share[n] * (1 - (1 - RATE * self.a[i]) ** STEPS) for i, n in enumerate(self.names)])
        return (pull * self.b).sum(0) / pull.sum(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, rounds",
    [("{name: fedbuff, buffer: 3, weights: equal}", 110), ("{name: fedasync, mu: 0.0, server_lr: 0.2}", 300)],
)
def test_a_silo_ten_times_slower(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, rounds: int
) -> None:
    """It still counts, by what it sends and how late that is, and the others do not wait for it."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of rounds
    speeds = f"federation.speeds={{kind: fixed, silos: {json.dumps(SECONDS)}}}"
    changes = (f"federation.algorithm={algorithm}", f"federation.rounds={rounds}", speeds)
    started, toys = Started(tiny, tmp_path, *changes), Learners()
    started.run(toys)
    arrivals, spec = told(started), started.recipe.federation.algorithm

    # Nobody waits: by the end everybody has answered as often as it can.
    end = started.rounds()[-1]["clock"]
    for name, each in SECONDS.items():
        times = int(end / (STEPS * each) + 1e-9)
        assert sum(a["silo"] == name for a in arrivals) in (times, times - 1)

    # The end lies around where the mean step vanishes, each silo counting as often as it answers, by its staleness.
    late = arrivals[len(arrivals) // 2 :]
    share = {n: sum(staleness_weight(spec, a["staleness"]) for a in late if a["silo"] == n) for n in SECONDS}
    path = [r.tensors["w"].double() for r in toys.of("evaluate") if r.silo == "s0"]
    assert len(path) >= rounds
    found = torch.stack(path[rounds // 2 :]).mean(0)
    wanted, without = toys.settled(share), toys.settled({**share, "s3": 0.0})
    spread = (toys.b.max(0).values - toys.b.min(0).values).norm()
    distance = (found - wanted).norm()
    assert distance < 0.02 * spread, (found, wanted)
    assert (found - without).norm() > 5 * distance, "the slow silo's text would be missed"
    assert (path[0] - wanted).norm() > 10 * distance
