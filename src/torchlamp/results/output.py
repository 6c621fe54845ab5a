"""Writing a result without losing what was there before."""

import contextlib
import os
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Find out before the work whether `write_text` can write there.

    Raises
    ------
    OSError
        The folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"can't write {str(path)!r}: it is a folder, give a file name")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"can't write {str(path)!r}: no permission")
    if _is_special(path):
        return
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"can't write {str(path)!r}: there is no folder {str(target.parent)!r}, make it first"
        )
    try:
        descriptor, probe = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OSError(f"can't write {str(path)!r}: {error.strerror or error}") from error
    os.close(descriptor)
    os.unlink(probe)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step: an older file stays as it is until the new one is complete on the disk.

    Raises
    ------
    OSError
        It can't be written, for example because the disk is full.
    """
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OSError(f"can't write {str(path)!r}: {error.strerror or error}") from error


def _is_special(path: Path) -> bool:
    """A device or pipe: it is written directly, and never replaced.

    Asked of the path as it was given: /dev/fd/63, which a shell gives for `>(gzip > out)`, is a link whose text
    names no file.
    """
    return path.exists() and not path.is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
