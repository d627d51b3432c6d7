"""Why a silo ends a request without an answer, beside the errors of its work."""


class RefusedError(Exception):
    """The request cannot be answered as it stands."""


class StoppedError(Exception):
    """The coordinator no longer waits for this reply."""
