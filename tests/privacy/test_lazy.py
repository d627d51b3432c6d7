"""The accountants take seconds to load: nobody who does not ask for privacy pays for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("dp_accounting", "scipy.stats", "scipy.optimize", "cryptography")


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import fedlm.cli.main, fedlm.privacy", HEAVY),
        ("import fedlm.privacy.mechanisms", (*HEAVY, "numpy", "torch")),
        ("import fedlm.privacy.ledger, fedlm.privacy.noise", ("dp_accounting", "torch")),
    ],
)
def test_imports(statement: str, heavy: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
