"""Lines and files between engine and workers: bounds, exact sizes, no way out of the spool."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from fedlm.errors import RunError
from fedlm.federation.engines import lines as lines_module
from fedlm.federation.engines.lines import ClosedError, Lines, spooled
from fedlm.federation.engines.wire import serialized_size, write_spool


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.zeros(3, 5)},
        {"b": torch.zeros(7, dtype=torch.bfloat16), "a.long.name": torch.zeros(2, 2), "i": torch.zeros(3).long()},
        {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4), "u": torch.zeros(9, dtype=torch.uint8)},
        {f"layer.{i}.wörd": torch.zeros(i, dtype=torch.float16) for i in range(30)},
    ],
)
def test_size_without_writing_is_the_size_written(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_spool(tmp_path / "t", tensors)
    assert serialized_size(tensors) == (tmp_path / "t").stat().st_size


def test_nothing_to_send_is_no_bytes() -> None:
    assert serialized_size({}) == 0


def test_names_stay_in_the_spool(tmp_path: Path) -> None:
    assert spooled(tmp_path, "reply-1.safetensors") == tmp_path / "reply-1.safetensors"
    for name in ("../x", "/etc/passwd", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="bare"):
            spooled(tmp_path, name)


def test_lines_cross_in_pieces_and_time_out() -> None:
    left, right = socket.socketpair()
    a, b = Lines(left), Lines(right)
    assert b.receive(timeout=0.01) is None
    left.sendall(b'{"x": ')
    assert b.receive(timeout=0.01) is None
    left.sendall(b'1}\n{"x": 2}\n')
    assert b.receive() == {"x": 1} and b.receive(timeout=0) == {"x": 2}
    a.close()
    with pytest.raises(ClosedError):
        b.receive()


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n"])
def test_whoever_breaks_the_protocol_is_gone(line: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(line)
    with pytest.raises(ClosedError):
        Lines(right).receive()


def test_lines_are_bounded_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE", 100)
    left, right = socket.socketpair()
    with pytest.raises(RunError, match="over the bound"):
        Lines(left).send({"x": "y" * 200})
    left.sendall(b"z" * 300)
    with pytest.raises(ClosedError):
        Lines(right).receive()
