"""What typical settings cost: the table of docs/differential-privacy.md.

python benchmarks/privacy_epsilons.py
"""

from __future__ import annotations

from fedlm.privacy.accounting import spent
from fedlm.privacy.mechanisms import DistributedNoise, Everyone, FixedSize, Gaussian, Mechanism, Poisson

FIVE_MILLION = 5_000_000


def settings() -> list[tuple[str, Mechanism, float]]:
    """What it is, the mechanism, and delta."""
    grid = 5.0 * FIVE_MILLION**0.5  # the bound is five steps per root of the dimension: rounding adds 1 % to the norm
    found: list[tuple[str, Mechanism, float]] = []
    for noise in (1.0, 2.0, 5.0, 10.0):
        found.append(("silo, all of 10 in 20 rounds", Gaussian("silo", "zero-out", noise, Everyone(), 20), 1e-2))
    for noise in (0.6, 1.0, 2.0):
        sampled = Poisson(0.01, secret=True)
        found.append(
            ("example, DP-SGD at 1 %, 1000 steps", Gaussian("example", "add-or-remove", noise, sampled, 1000), 1e-5)
        )
    for noise in (4.0, 8.0):
        sampled_silos = FixedSize(5, 50, secret=True)
        found.append(("silo, secret 5 of 50 in 20 rounds", Gaussian("silo", "replace", noise, sampled_silos, 20), 1e-3))
        found.append(("the same, sample known to others", Gaussian("silo", "replace", noise, Everyone(), 20), 1e-3))
    for kind in ("discrete-gaussian", "skellam"):
        mechanism = DistributedNoise("silo", "zero-out", kind, 5.0, grid, FIVE_MILLION, survivors=5, count=20)
        found.append((f"silo, {kind} of at least 5 silos, 5 million numbers, 20 rounds", mechanism, 1e-2))
    return found


def main() -> None:
    print("| unit and mechanism | adjacency | noise multiplier | delta | epsilon (PLD) | epsilon (RDP) |")
    print("|---|---|---|---|---|---|")
    for words, mechanism, delta in settings():
        cost = spent([mechanism], delta)
        bounds = ["-" if bound is None else f"{bound:.2f}" for bound in (cost.pld, cost.rdp)]
        cells = [words, mechanism.adjacency, f"{mechanism.noise_multiplier:g}", f"{delta:g}", *bounds]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
