"""What is on the disk when a call returns. Not in `core`, which does no I/O; imports nothing of ours."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Makes the names in it durable, not only the files behind them. Blocks for the disk; raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_private(path: Path, content: bytes, *, synced: bool) -> None:
    """Readers see the old content or the new, never a part, and only the owner may read it, from the first byte on.

    `synced`: when it returns the content is on the disk; which of the two `path` names after a power cut is another matter
    (`sync_directory`). Raises OSError, and then has left nothing.
    """
    import tempfile  # the journal imports this module, and `import wbdist` stays light

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
