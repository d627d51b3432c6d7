"""What a silo's audit log keeps of a request: words that the silo knows itself, and sizes."""

from __future__ import annotations

from fedlm.federation.silo import auditlog
from fedlm.federation.silo.agreements import RUN
from fedlm.federation.silo.door import VERBS
from fedlm.federation.silo.masked import VERBS as MASK_VERBS
from fedlm.federation.silo.spent import bytes_of
from fedlm.messages import Failure, Reply, Request


def audited(request: Request, answer: Reply | Failure, line: str | None, recipe: str | None) -> auditlog.Line:
    """A request and its answer as a line of the log.

    Args:
        line: the policy's line that refused it, if one did.
        recipe: the digest of the recipe that it is about, if that is known.
    """
    return {
        "kind": auditlog.REQUEST,
        "verb": request.verb if request.verb in VERBS or request.verb in MASK_VERBS else "(unknown)",
        "run": request.run if RUN.fullmatch(request.run) else "(improper)",
        "round": request.round,
        "attempt": request.attempt,
        "recipe": recipe,
        "in": bytes_of(request.tensors, request.fields),
        "out": bytes_of(answer.tensors, answer.fields) if isinstance(answer, Reply) else 0,
        "outcome": "answered" if isinstance(answer, Reply) else answer.kind.value,
        "line": line,
    }
