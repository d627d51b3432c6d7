"""Runs a pipeline and kills it again and again: a process of its own that imports once and forks each attempt.

    python pipeline_driver.py FILE RUN_DIR [STAGE:EVENT ...]

For each STAGE:EVENT an attempt that ends by SIGKILL at that stage's first event of this kind, then one to the end.
Fails if an attempt ends otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def attempt(file: Path, folder: Path, stage: str, kind: str) -> int:
    """Run or resume in a fork; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        from fedlm.comparison.pipeline import run_pipeline
        from fedlm.recipe.pipeline import load_pipeline

        def observe(event: dict[str, object]) -> None:
            if event.get("arm") == stage and event["kind"] == kind:
                os.kill(os.getpid(), signal.SIGKILL)

        resume = (folder / "pipeline.json").exists()
        outcome = run_pipeline(load_pipeline(file, folder), folder, resume=resume, observe=observe)
        code = 0 if outcome["status"] == "finished" else 3
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def main() -> None:
    file, folder, *kills = sys.argv[1:]
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fedlm.comparison.pipeline
    import fedlm.federation.coordinator
    import fedlm.models.export
    import fedlm.training.loop  # noqa: F401

    torch.set_num_threads(1)
    for kill in [*kills, ":"]:
        status = attempt(Path(file), Path(folder), *kill.split(":"))
        wanted = 0 if kill == ":" else signal.SIGKILL
        if status != wanted:
            raise SystemExit(f"{kill}: an attempt ended with status {status}")


if __name__ == "__main__":
    main()
