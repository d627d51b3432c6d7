"""Updates that stay files: the same tensors, the same fold, and headers that lie."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlm.algorithms.base import Accumulator
from fedlm.errors import UpdateRefused
from fedlm.federation.engines.lazy import FileTensors
from fedlm.federation.engines.wire import write_spool
from fedlm.federation.updates import check_update
from fedlm.messages import Tensors


def some() -> Tensors:
    return {
        "b": torch.randn(7, 3),
        "a.half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "n": torch.arange(6).view(2, 3),
    }


def lazy(folder: Path, tensors: Tensors) -> FileTensors:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    write_spool(path, tensors)
    return FileTensors(path)


def test_reads_what_was_written(tmp_path: Path) -> None:
    tensors = some()
    found = lazy(tmp_path, tensors)
    assert dict(found).keys() == tensors.keys() and len(found) == 5
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor)
    with pytest.raises(KeyError):
        found["other"]


def test_the_file_goes_with_the_object(tmp_path: Path) -> None:
    found = lazy(tmp_path, some())
    path = found.path
    assert path.exists()
    del found
    gc.collect()
    assert not path.exists()


def test_folds_to_the_same_bits(tmp_path: Path) -> None:
    whole, by_file = Accumulator(), Accumulator()
    for weight in (3.0, 0.7, 11.0):
        update = {"x": torch.randn(1000), "w": torch.randn(64, 33), "h": torch.randn(100).bfloat16()}
        whole.add(update, weight)
        by_file.add(lazy(tmp_path, update), weight)
    assert by_file.weight == whole.weight and by_file.count == 3
    part = {"x": torch.randn(1000)}  # from a silo that trained one tensor alone
    whole.add(part, 2.0)
    by_file.add(lazy(tmp_path, part), 2.0)
    assert by_file.counted("x") == 4 and by_file.counted("w") == 3
    for (name, a), (other, b) in zip(whole.mean(), by_file.mean(), strict=True):
        assert name == other and torch.equal(a, b)


def test_is_checked_like_any_update(tmp_path: Path) -> None:
    good = {"w": torch.randn(4, 4)}
    expected = {"w": torch.Size([4, 4])}
    check_update("a", lazy(tmp_path, good), expected, 1.0, max_weight=2.0)
    for bad in ({"w": torch.full((4, 4), float("nan"))}, {"w": torch.randn(4, 5)}, {"v": torch.randn(4, 4)}):
        with pytest.raises(UpdateRefused):
            check_update("a", lazy(tmp_path, bad), expected, 1.0, max_weight=2.0)


def header(path: Path, text: bytes, data: bytes = bytes(64)) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [60, 76]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
        [],
        "x",
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, about: object) -> None:
    with pytest.raises(ValueError):
        FileTensors(header(tmp_path / "f", json.dumps({"w": about}).encode()))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "f"
    path.write_bytes(data)
    try:
        found = FileTensors(path)
    except ValueError:
        return
    assert all(found[name].nbytes <= len(data) for name in found)
