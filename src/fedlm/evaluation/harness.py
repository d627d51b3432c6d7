"""The adapter to lm-eval's harness: its tasks on the model in memory, adapter included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlm.errors import MissingExtra, RunError
from fedlm.messages import Fields


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> Fields:
    """Run lm-eval tasks; their names go to lm-eval as they are, and so do paths of its YAML files.

    Args:
        limit: examples per task; all by default.
        chat: show prompts in the model's chat template.

    Returns:
        {task: {metric: value}}, lm-eval's own results.

    Raises:
        MissingExtra: lm-eval is not installed.
        RunError: lm-eval cannot run a task, mostly since its data is not on this machine.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise MissingExtra("the lm-eval harness", "eval") from None
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", softmax_dtype="float32"
    )
    try:
        outcome = simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, apply_chat_template=chat, log_samples=False
        )
    except Exception as error:
        raise RunError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {_first_line(error)})",
            fix="check the tasks' names; their data must be on this machine or reachable",
        ) from error
    return {task: _plain(values) for task, values in (outcome or {}).get("results", {}).items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _plain(values: dict[str, Any]) -> Fields:
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
