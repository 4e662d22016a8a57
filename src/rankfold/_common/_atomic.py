"""The only way in which files are written: completely or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new path next to `path` to write to; it replaces `path` when the block ends without an exception.

    The bytes reach the disk before the file is renamed, so that a reader sees the old file or the new one, never a part
    of it. After any exception, including Ctrl-C, the old file is unchanged and nothing is left next to it. A symbolic
    link keeps pointing to the file that is replaced; an existing file keeps its permissions.

    Args:
        path: the file to write or replace. The temporary name has the same suffix.

    Yields:
        The path of an empty file in the same directory.

    Raises:
        OSError: the directory cannot be written to, or `path` is something other than a regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "note.txt") as unfinished:
        ...         _ = unfinished.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['note.txt']
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is not a regular file and cannot be replaced by one")
    unfinished = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((target if target.exists() else unfinished).stat().st_mode)
        yield unfinished
        os.chmod(unfinished, mode)
        _flush(unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    _flush_directory(target.parent)


def _flush(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    if os.name != "posix":  # only on POSIX can a directory be opened and flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
