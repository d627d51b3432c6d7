"""What a full, read-only or forbidden disk says, as one sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from fedlm.errors import RunError


@contextlib.contextmanager
def disk_errors(path: Path, what: str = "run directory") -> Iterator[None]:
    """Turn what a full, read-only or forbidden disk raises into one sentence.

    Args:
        what: what lies there, in the sentence's words.

    Raises:
        RunError: naming the path and what to do.
    """
    try:
        yield
    except OSError as error:
        raise disk_fault(error, path, what) from error
    except Exception as error:
        # safetensors wraps the system's error in its own type and keeps only the text.
        if type(error).__name__ == "SafetensorError" and any(s in str(error) for s in ("No space", "os error", "I/O")):
            code = errno.ENOSPC if "No space" in str(error) or "os error 28" in str(error) else errno.EIO
            raise disk_fault(OSError(code, str(error)), path, what) from error
        raise


def disk_fault(error: OSError, path: Path, what: str = "run directory") -> RunError:
    where = str(path)
    if what != "run directory":
        reason = "its disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        return RunError(f"the {what} cannot be written ({reason or type(error).__name__})", where=where)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            "the disk that holds the run directory is full",
            where=where,
            fix="free some space, then continue with --resume; the last finished round is intact",
        )
    if error.errno == errno.EROFS:
        return RunError(
            "the run directory lies on a read-only file system", where=where, fix="choose a writable --run-dir"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return RunError(
            "the run directory is not writable for this user", where=where, fix="choose a writable --run-dir"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return RunError(
            "a file stands where the run directory needs a folder", where=where, fix="choose another --run-dir"
        )
    return RunError(f"the run directory cannot be written ({error.strerror or type(error).__name__})", where=where)
