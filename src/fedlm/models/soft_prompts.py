"""Soft prompts: vectors before the text are trained, and no weight of the model changes.

- 'prompt' (Lester et al., EMNLP 2021): n rows where words have their embeddings;
- 'p-tuning' (Liu et al., 2021): such rows as an MLP or LSTM makes them of trained inputs;
- 'prefix' (Li and Liang, ACL 2021): keys and values of n tokens in every layer;
- 'prompt-projection' (Sun et al., ICML 2022): n rows p0 + A z with a fixed random A and a trained z of few numbers.

Rows start at the embeddings of words (of `prompt_text`, or drawn), keys and values at those that the model computes for
these words: training begins where the same words as an ordinary prompt would leave the model. The names of tensors and
what they mean are PEFT's, except that each layer of a prefix is a tensor of its own, which in PEFT lie side by side in
one; PEFT loads what is exported (`fedlm.models.export`).

The n virtual tokens are ordinary tokens of the sequence with ids beyond the vocabulary, which the embedding layer looks
up in the prompt: in a packed row they are a beginning that all sequences share, and so computed once. A prefix has the
same n places, whose keys and values are replaced in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.folders import quiet
from fedlm.randomness import numpy_generator, torch_generator
from fedlm.recipe.schema import AdapterSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = "prompt_encoder.layers.{}"
"""Name of a layer of a prefix."""
OFF = "prompt_encoder.off"
"""Name of a tensor that stands for the base model: whoever loads it computes without the prompt."""


class SoftPromptModel(nn.Module):
    """A model with a soft prompt. Plain calls (`input_ids`, masks, caches) are the base's, with the prompt before them;
    packed rows hold the virtual tokens already (`fedlm.training.forward`).

    Attributes:
        base_model: the frozen model.
        prompt_encoder: what makes the prompt; its parameters are trained.
    """

    def __init__(self, model: PreTrainedModel, spec: AdapterSpec) -> None:
        super().__init__()
        self.base_model, self.spec, self.off = model, spec, False
        self.vocabulary = len(model.get_input_embeddings().weight)
        self.prompt_encoder = _encoder(model, spec)
        model.set_input_embeddings(_Embedding(model.get_input_embeddings(), self))

    @property
    def virtual_tokens(self) -> int:
        """Tokens before every sequence."""
        return 0 if self.off else self.spec.virtual_tokens

    def virtual_ids(self) -> Tensor:
        """int64 [n]: the virtual tokens' ids."""
        return torch.arange(self.vocabulary, self.vocabulary + self.virtual_tokens)

    def rows(self) -> Tensor:
        """The prompt [n, hidden]; of a prefix [n, layers * 2 * kv heads * head size]. fp32, differentiable."""
        made: Tensor = self.prompt_encoder()
        return made

    def key_values(self) -> Tensor:
        """A prefix's keys and values [layers, 2, n, kv heads, head size], fp32, differentiable."""
        layers, heads, size = kv_sizes(self.base_model.config)
        return self.rows().view(self.spec.virtual_tokens, layers, 2, heads, size).permute(1, 2, 0, 3, 4)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        n = self.virtual_tokens
        if n == 0 or "packed" in inputs:
            return self.base_model(input_ids=input_ids, **inputs)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), n), mask], 1)
        if positions is not None:
            inputs["position_ids"] = positions + n
        if inputs.get("past_key_values") is not None:
            return self.base_model(input_ids=input_ids, **inputs)
        if self.spec.kind == "prefix":
            return self.base_model(input_ids=input_ids, **inputs | {"past_key_values": self._cache(len(input_ids))})
        virtual = self.virtual_ids().to(input_ids.device).expand(len(input_ids), n)
        if positions is not None:
            before = torch.arange(n, device=positions.device).expand(len(positions), n)
            inputs["position_ids"] = torch.cat([before, inputs["position_ids"]], 1)
        keep = inputs.get("logits_to_keep")
        if isinstance(keep, Tensor):
            inputs["logits_to_keep"] = torch.cat([keep.new_zeros(len(keep), n), keep], 1)
        return self.base_model(input_ids=torch.cat([virtual, input_ids], 1), **inputs)

    def _cache(self, batch: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.base_model.config)
        for layer, (keys, values) in enumerate(self.key_values().to(self.base_model.config.dtype)):
            shape = (batch, keys.shape[1], keys.shape[0], keys.shape[2])
            cache.update(keys.transpose(0, 1).expand(shape), values.transpose(0, 1).expand(shape), layer)
        return cache

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, there is no prompt."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


class _Embedding(nn.Module):
    """The base's embedding layer, in which ids beyond the vocabulary are the prompt's rows."""

    def __init__(self, words: Any, owner: SoftPromptModel) -> None:
        super().__init__()
        self.words = words
        self._owner = (owner,)  # in a tuple, so that it is no submodule of its own part

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.words.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        (owner,) = self._owner
        if owner.off:
            plain: Tensor = self.words(ids)
            return plain
        virtual = ids - owner.vocabulary
        words: Tensor = self.words(ids.clamp(max=owner.vocabulary - 1))
        if owner.spec.kind == "prefix":  # a place holder: its keys and values are replaced in every layer
            return words.masked_fill((virtual >= 0)[..., None], 0.0)
        rows = owner.rows().to(words.dtype)
        return torch.where((virtual >= 0)[..., None], rows[virtual.clamp(min=0)], words)


class Layers(nn.Module):
    """A prefix: of each layer the tokens' keys and values [tokens, 2 * kv heads * head size], keys first."""

    def __init__(self, tokens: int, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(tokens, width)) for _ in range(layers))

    def forward(self) -> Tensor:
        return torch.cat(list(self.layers), 1)


class Rows(nn.Module):
    """A prompt that is trained as it is."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)

    def forward(self) -> Tensor:
        rows: Tensor = self.embedding.weight
        return rows


class Encoded(nn.Module):
    """P-tuning: trained inputs through an MLP, or through a bidirectional LSTM and a smaller MLP (as PEFT's)."""

    def __init__(self, tokens: int, width: int, spec: AdapterSpec) -> None:
        super().__init__()
        inner = spec.encoder_hidden or width
        self.embedding = nn.Embedding(tokens, width)
        if spec.encoder == "lstm":
            self.lstm_head = nn.LSTM(width, inner, spec.encoder_layers, bidirectional=True, batch_first=True)
            layers = [nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, width)]
        else:
            layers = [nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width)]
        self.mlp_head = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        inputs = self.embedding.weight
        with torch.autocast(inputs.device.type, enabled=False):  # small, and in fp32 as its parameters
            if hasattr(self, "lstm_head"):
                inputs = self.lstm_head(inputs[None])[0][0]
            made: Tensor = self.mlp_head(inputs)
        return made


class Projected(nn.Module):
    """p0 + A z. A [n * width, d] and p0 are fixed and shared; z [d] is trained."""

    A: Tensor
    p0: Tensor

    def __init__(self, tokens: int, width: int, dimension: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))
        self.register_buffer("A", torch.zeros(tokens * width, dimension), persistent=False)
        self.register_buffer("p0", torch.zeros(tokens, width), persistent=False)

    def forward(self) -> Tensor:
        with torch.autocast(self.z.device.type, enabled=False):
            return self.p0 + (self.A @ self.z).view_as(self.p0)


def _encoder(model: PreTrainedModel, spec: AdapterSpec) -> nn.Module:
    width = int(model.get_input_embeddings().weight.shape[1])
    if spec.kind == "prefix":
        layers, heads, size = kv_sizes(model.config)
        return Layers(spec.virtual_tokens, layers, 2 * heads * size)
    if spec.kind == "p-tuning":
        return Encoded(spec.virtual_tokens, width, spec)
    if spec.kind == "prompt-projection":
        return Projected(spec.virtual_tokens, width, spec.intrinsic_dim)
    return Rows(spec.virtual_tokens, width)


def kv_sizes(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and the size of a head."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def attach_prompt(model: PreTrainedModel, spec: AdapterSpec, seed: int) -> SoftPromptModel:
    """The model with a soft prompt at its first values; parameters are fp32.

    Raises:
        ModelError: `prompt_text` has no token, or the virtual tokens leave no room in the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and spec.virtual_tokens >= limit:
        raise ModelError(
            f"{spec.virtual_tokens} virtual tokens leave no room in the model's {limit} positions",
            where="adapter.virtual_tokens",
            fix="take fewer",
        )
    with torch.random.fork_rng(devices=[]):  # torch's own first values are overwritten
        wrapped = SoftPromptModel(model, spec)
    wrapped.prompt_encoder.to(model.get_input_embeddings().weight.device)
    if not model.get_input_embeddings().weight.is_meta:
        with torch.no_grad():
            first = first_values(wrapped, seed)
            for name, parameter in wrapped.prompt_encoder.named_parameters():
                parameter.copy_(first[f"prompt_encoder.{name}"])
            if isinstance(wrapped.prompt_encoder, Projected):
                _fix_projection(wrapped, wrapped.prompt_encoder, seed)
    return wrapped


@torch.no_grad()
def first_values(model: SoftPromptModel, seed: int) -> Tensors:
    """The prompt's parameters before training, by name: fp32 on the CPU."""
    spec, named = model.spec, dict(model.prompt_encoder.named_parameters())
    if spec.kind == "p-tuning":
        return {f"prompt_encoder.{name}": _drawn(name, value.shape, seed) for name, value in named.items()}
    if spec.kind == "prompt-projection":
        return {"prompt_encoder.z": torch.zeros(spec.intrinsic_dim)}
    ids = _first_words(model, seed)
    if spec.kind == "prefix":
        with model.disable_adapter():
            cache = model.base_model(input_ids=ids[None].to(model.base_model.device), use_cache=True).past_key_values
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # [2, heads, n, size]
        columns = [pair.permute(2, 0, 1, 3).reshape(len(ids), -1).to("cpu", torch.float32) for pair in pairs]
        return {LAYER.format(layer): value for layer, value in enumerate(columns)}
    value = model.base_model.get_input_embeddings().weight[ids.to(model.base_model.device)]
    return {"prompt_encoder.embedding.weight": value.to("cpu", torch.float32)}


def _drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Of p-tuning: inputs N(0, 1), biases 0, matrices uniform in +-1/sqrt(fan in), the LSTM's in +-1/sqrt(its size)."""
    generator = torch_generator(seed, "adapter", f"prompt_encoder.{name}")
    if name == "embedding.weight":
        return torch.randn(shape, generator=generator)
    if "bias" in name:
        return torch.zeros(shape)
    bound = (shape[0] // 4 if name.startswith("lstm") else shape[1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _first_words(model: SoftPromptModel, seed: int) -> Tensor:
    """int64 [n]: the tokens that the prompt begins as: those of `prompt_text`, repeated or cut, or drawn ones."""
    n = model.spec.virtual_tokens
    if model.spec.prompt_text is None:
        drawn = numpy_generator(seed, "adapter", "prompt words").integers(model.vocabulary, size=n)
        return torch.from_numpy(drawn)
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            model.base_model.name_or_path, trust_remote_code=False, local_files_only=True
        )
    ids = tokenizer(model.spec.prompt_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError("the text has no token of this model", where="adapter.prompt_text")
    return torch.tensor((ids * -(-n // len(ids)))[:n])


def _fix_projection(model: SoftPromptModel, encoder: Projected, seed: int) -> None:
    """A's entries are normal with deviation s / sqrt(d), so that z ~ N(0, I) moves the prompt by as much as word
    embeddings are large (s: root mean square of theirs); p0 is the prompt's first words."""
    weight = model.base_model.get_input_embeddings().weight
    s = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / weight.numel() ** 0.5
    drawn = torch.randn(encoder.A.shape, generator=torch_generator(seed, "adapter", "projection"))
    encoder.A.copy_(drawn.mul_(s * encoder.A.shape[1] ** -0.5))
    encoder.p0.copy_(weight[_first_words(model, seed).to(weight.device)])


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that the model reads before every sequence; 0 without a soft prompt."""
    return int(getattr(model, "virtual_tokens", 0))


def peft_prompt_config(model: SoftPromptModel) -> Any:
    """What PEFT calls this prompt; a projected one is exported as the rows that it makes."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    spec, config = model.spec, model.base_model.config
    layers, heads, size = kv_sizes(config)
    width = int(model.base_model.get_input_embeddings().weight.shape[1])
    sizes = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": spec.virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": layers,
    }
    if spec.kind == "prefix":
        return PrefixTuningConfig(
            **sizes, token_dim=heads * size, num_attention_heads=heads, encoder_hidden_size=heads * size
        )
    sizes |= {"token_dim": width, "num_attention_heads": int(config.num_attention_heads)}
    if spec.kind == "p-tuning":
        return PromptEncoderConfig(
            **sizes,
            encoder_reparameterization_type=spec.encoder.upper(),
            encoder_hidden_size=spec.encoder_hidden or width,
            encoder_num_layers=spec.encoder_layers,
        )
    return PromptTuningConfig(**sizes)
