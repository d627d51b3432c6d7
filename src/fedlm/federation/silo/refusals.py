"""Why a silo ends a request without an answer, beside the errors of its work."""


class RefusedError(Exception):
    """The request cannot be answered as it stands.

    Attributes:
        line: the name of the policy's line that says so; None where it is no line's doing.
    """

    def __init__(self, reason: str, line: str | None = None) -> None:
        self.line = line
        super().__init__(reason)


class StoppedError(Exception):
    """The coordinator no longer waits for this reply."""


class Forbidden(Exception):
    """The silo's owner does not allow this; the text says what, and what is allowed. It is sent to the coordinator.

    Attributes:
        line: the name of the policy's line that says so; None where it is no line's doing.
    """

    def __init__(self, reason: str, line: str | None = None) -> None:
        self.line = line
        super().__init__(reason)
