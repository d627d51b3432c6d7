"""Deltas: fp32 matrices that a silo adds to frozen weights in the forward pass, never rounded into bf16 weights.

What several LoRA methods merge into the base (a residual, a stack of factors) is kept beside it: a small dW added to
bf16 weights is mostly rounded away (77 % of it at |dW|/|W| = 1e-3). By name, for a LoRA layer:

    <layer>.delta_A.<piece>  [R, d_in]   with
    <layer>.delta_B.<piece>  [d_out, R]      a low-rank piece, B A
    <layer>.delta_W.<piece>  [d_out, d_in]   a dense piece

There may be any number of pieces; the weight that acts is W + sum of the pieces + s B A of the trained factors. In the
forward pass they are cast to the activations' type, as the trained factors are: on a bf16 base each acts to some 2^-9
of itself. It is rounded once, however many rounds it has grown: what travels, is stored and is exported stays fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AdapterSpec

_NAME = re.compile(r"(?P<layer>.+)\.delta_(?P<part>[ABW])\.(?P<piece>[^.]+)")


Pieces = dict[str, dict[str, tuple[Tensor, ...]]]
"""By layer and piece: factors (B, A), or a dense matrix (W,)."""


def is_delta(name: str) -> bool:
    """Whether a tensor of this name is a part of a delta."""
    return _NAME.fullmatch(name) is not None


def pieces_of(tensors: Mapping[str, Tensor]) -> Pieces:
    """The pieces of all deltas among these tensors."""
    found: Pieces = {}
    for name, tensor in tensors.items():
        if (match := _NAME.fullmatch(name)) and match["part"] != "B":
            piece = (
                (tensor,)
                if match["part"] == "W"
                else (tensors[piece_name(match["layer"], "B", match["piece"])], tensor)
            )
            found.setdefault(match["layer"], {})[match["piece"]] = piece
    return found


def piece_name(layer: str, part: str, piece: str) -> str:
    """The name of a tensor of a piece; `part` is A, B or W."""
    return f"{layer}.delta_{part}.{piece}"


@dataclass(frozen=True)
class Delta:
    """All pieces of one layer: factors A [R, d_in] and B [d_out, R], or a dense W [d_out, d_in]; None where absent."""

    A: Tensor | None = None
    B: Tensor | None = None
    W: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of the factors; 0 without."""
        return 0 if self.A is None else len(self.A)

    def dense(self) -> Tensor:
        """The matrix [d_out, d_in], fp32."""
        low = None if self.A is None or self.B is None else self.B.float() @ self.A.float()
        if self.W is None:
            assert low is not None, "a delta has factors or a matrix"
            return low
        return self.W.float() if low is None else self.W.float() + low

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook of a PEFT LoRA layer."""
        if module.disable_adapters:
            return output
        x = args[0].to(output.dtype)
        if self.A is not None and self.B is not None:
            output = output + (x @ self.A.t().to(x.dtype)) @ self.B.t().to(x.dtype)
        if self.W is not None:
            output = output + x @ self.W.t().to(x.dtype)
        return output


def deltas_of(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """The deltas among these tensors, by layer, their pieces joined.

    Raises:
        ModelError: a factor without its other half, or shapes that do not go together.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match["layer"], {}).setdefault(match["part"], {})[match["piece"]] = tensor
    deltas: dict[str, Delta] = {}
    for layer, parts in found.items():
        a, b, w = (parts.get(part, {}) for part in "ABW")
        if a.keys() != b.keys() or any(a[piece].shape[0] != b[piece].shape[1] for piece in a):
            raise ModelError("a delta's factors do not go together", where=layer)
        if len({tensor.shape for tensor in w.values()}) > 1:
            raise ModelError("a delta's pieces have different shapes", where=layer)
        order, dense = sorted(a), [w[piece].float() for piece in sorted(w)]
        deltas[layer] = Delta(
            torch.cat([a[piece] for piece in order]) if order else None,
            torch.cat([b[piece] for piece in order], dim=1) if order else None,
            sum(dense[1:], dense[0]) if dense else None,
        )
    return deltas


def put_deltas(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Let the LoRA layers (by name) add these deltas, and no others, kept in `dtype` for the products.

    Raises:
        ModelError: a delta of no LoRA layer, or of another shape than its weight.
    """
    deltas = deltas_of(tensors)
    if strangers := sorted(deltas.keys() - layers.keys()):
        raise ModelError(f"there is a delta for '{strangers[0]}', which is no LoRA layer of this model")
    for name, layer in layers.items():
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, Delta):
                del layer._forward_hooks[key]
        if name in deltas:
            delta, weight = deltas[name], layer.get_base_layer().weight
            shape = (layer.out_features, layer.in_features)  # of 4-bit weights the tensor has another
            given = [t.shape for t in (delta.W,) if t is not None]
            if delta.A is not None and delta.B is not None:
                given.append(torch.Size((len(delta.B), delta.A.shape[1])))
            if other := [list(g) for g in given if tuple(g) != shape]:
                raise ModelError(f"a delta has shape {other[0]}, the weight {list(shape)}", where=name)
            placed = (None if t is None else t.to(weight.device, dtype) for t in (delta.A, delta.B, delta.W))
            layer.register_forward_hook(Delta(*placed))


def joined(tensors: Tensors, adapter: AdapterSpec) -> tuple[Tensors, AdapterSpec]:
    """Adapter and deltas as one LoRA adapter of a larger rank, the same in every layer, that acts alike.

    Args:
        tensors: all LoRA parameters of an adapter, with or without deltas.
        adapter: what they are.

    Returns:
        The parameters, and the adapter they now are: factors are joined, dense deltas become factors with an identity,
        and smaller layers are filled up with zeros. Unchanged without deltas.
    """
    deltas = deltas_of(tensors)
    plain = {name: tensor for name, tensor in tensors.items() if not is_delta(name)}
    if not deltas:
        return plain, adapter
    scale = adapter.scale(adapter.rank)
    factors = {layer: _factors(delta) for layer, delta in deltas.items()}
    extra = max(len(a) for a, _ in factors.values())
    out: Tensors = {}
    for name, tensor in plain.items():
        if (match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)) is None:  # a head beside the adapter
            out[name] = tensor
            continue
        layer, part = match.groups()
        a, b = factors.get(layer, (None, None))
        if part == "A":
            filled = torch.zeros(extra, tensor.shape[1])
            if a is not None:
                filled[: len(a)] = a
            out[name] = torch.cat([tensor.float(), filled])
        else:
            filled = torch.zeros(tensor.shape[0], extra)
            if b is not None:
                filled[:, : b.shape[1]] = b / scale
            out[name] = torch.cat([tensor.float(), filled], dim=1)
    rank = adapter.rank + extra
    alpha = scale * (rank**0.5 if adapter.rslora else rank)
    return out, adapter.model_copy(update={"rank": rank, "alpha": alpha})


def parted(tensors: Tensors, rank: int, scale: float) -> Tensors:
    """The way back from `joined`: the first `rank` rows and columns stay the adapter, the others become deltas."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight") and len(tensor) > rank:
            out[name] = tensor[:rank].contiguous()
            out[name.replace(".lora_A.weight", ".delta_A.joined")] = tensor[rank:].contiguous()
        elif name.endswith(".lora_B.weight") and tensor.shape[1] > rank:
            out[name] = tensor[:, :rank].contiguous()
            out[name.replace(".lora_B.weight", ".delta_B.joined")] = tensor[:, rank:] * scale
        else:
            out[name] = tensor
    return out


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    a, b = delta.A, delta.B
    if delta.W is not None:
        d_out, d_in = delta.W.shape
        w = delta.W.float()
        wide_a, wide_b = (torch.eye(d_in), w) if d_in <= d_out else (w, torch.eye(d_out))
        a = wide_a if a is None else torch.cat([a.float(), wide_a])
        b = wide_b if b is None else torch.cat([b.float(), wide_b], dim=1)
    assert a is not None and b is not None
    return a.float(), b.float()
