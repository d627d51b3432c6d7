"""A predictor of a group's preferences beside a frozen language model, in context: from examples, without training.

The module of Group Preference Optimization (Zhao, Dang and Grover, ICLR 2024, arXiv 2310.11523), which PluralLLM (Srewa
et al., 2025, arXiv 2503.09925) trains by federated averaging: a transformer without positions over points. A point is
an answer x, the mean of the frozen model's last hidden states over a conversation that ends with it, and the share y of
the group that prefers it. Context points are read as [x; y], the others as [x; 0]. Context points attend to one
another, every other point to the context and to itself, so that what is said of it depends on no other one.

Here as in the authors' code the module gives a score, and the softmax of the scores over the answers to one question is
the predicted distribution. It differs in five ways. It gives the mean alone, for a squared error, where the paper's has
a variance too; x is normalised first (zero mean, unit variance), since the scale of hidden states differs by model; the
first layer's column for y starts at a scale of its own, else 4,096 numbers of x would drown it; x and y are embedded by
two layers instead of four; and a point attends to itself, which in the authors' code its residual stream stands for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu, scaled_dot_product_attention

from fedlm.recipe.schema import AdapterSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREDICTOR = "predictor."
"""What the names of its parameters begin with."""


class Predictor(nn.Module):
    """Points to scores.

    Args:
        features: numbers of x.
        width: of all inner layers.
    """

    def __init__(self, features: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(features, width), nn.Linear(1, width, bias=False)  # of [x; y], side by side
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.hidden, self.score = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor, context: Tensor) -> Tensor:
        """The score of every point [..., points], fp32, differentiable.

        Args:
            x: [..., points, features].
            y: [..., points]; read of context points alone.
            context: bool [..., points].
        """
        x = layer_norm(x.float(), x.shape[-1:])
        known = torch.where(context, y, 0.0)[..., None]
        states = self.embed(relu(self.x(x) + self.y(known)))
        seen = context[..., None, :] | torch.eye(context.shape[-1], dtype=torch.bool, device=context.device)
        for layer in self.layers:
            states = layer(states, seen)
        scores: Tensor = self.score(relu(self.hidden(states)))[..., 0]
        return scores


class Layer(nn.Module):
    """A transformer's encoder layer (Vaswani et al., NeurIPS 2017), its feed-forward part no wider than the rest."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """states [..., points, width]; seen bool [..., points, points]: row i attends to column j."""
        q, k, v = self.attend(states).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen[..., None, :, :])
        states = self.norm1(states + self.out(found.transpose(-2, -3).flatten(-2)))
        made: Tensor = self.norm2(states + self.down(relu(self.up(states))))
        return made


class PredictorModel(nn.Module):
    """A frozen model with a predictor beside it. Calls are the model's own.

    Attributes:
        base_model: the frozen model.
        predictor: its parameters are trained.
    """

    def __init__(self, model: PreTrainedModel, spec: AdapterSpec) -> None:
        super().__init__()
        self.base_model = model
        weight = model.get_output_embeddings().weight  # reads the same states
        with torch.random.fork_rng(devices=[]):  # torch's own first values are overwritten
            self.predictor = Predictor(weight.shape[1], spec.width, spec.layers, spec.heads).to(weight.device)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.base_model(*args, **inputs)

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)
