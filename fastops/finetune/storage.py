"""Where a run writes: its folder, and files that appear under their name only when complete."""

import contextlib
import errno
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError

UNFINISHED = ".unfinished."
"""What the names of files that are still being written start with."""

FULL = 1 << 16
"""A disk with fewer free bytes than this is what stopped torch.save, whose own error tells of positions in a file."""


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block ends well.

    A crash, a full disk or an exception leaves whatever was at `path` before.

    Raises:
        OutputError: the file cannot be written or renamed.
    """
    # The name ends as before: matplotlib and Pillow choose the format by the suffix.
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}.{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        # What it had written by then is still there, so that the disk is still full.
        with contextlib.suppress(OSError):
            if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < FULL:
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left anywhere below `folder`.

    Raises:
        OutputError: one of them cannot be removed.
    """
    for path in folder.rglob(f"{UNFINISHED}*"):
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"cannot remove {path}: {error.strerror}") from error


def check_run_folder(folder: Path) -> None:
    """Raise OutputError for a folder that is neither new, in one that exists, nor empty."""
    if not folder.parent.is_dir():
        raise OutputError(f"cannot create {folder}: there is no folder {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"{folder} is not empty: choose a new folder, so that no earlier run is lost"
        )


def make_run_folder(out: str | os.PathLike | None) -> Path:
    """Create the folder of a run and prove that it can be written, before any time is spent.

    Args:
        out: a folder that is new or empty and whose parent exists; None for
            ./runs/finetune-<timestamp>.

    Raises:
        OutputError: the parent is missing, the folder has content or cannot be written.
    """
    try:
        if out is None:
            Path("runs").mkdir(exist_ok=True)
            name = "finetune-" + time.strftime("%Y%m%d-%H%M%S")
            folder = Path("runs") / name
            for repeat in range(2, 1000):
                if not folder.exists():
                    break
                folder = Path("runs") / f"{name}-{repeat}"
        else:
            folder = Path(out)
            check_run_folder(folder)
        folder.mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write into {out or 'runs'}: {error.strerror}") from error
    return folder


def check_records(path: Path) -> None:
    """Compare the records of a file that torch.save wrote with their checksums; torch.load does not.

    Raises:
        ValueError: a record has changed since.
        zipfile.BadZipFile: the archive is damaged.
    """
    if zipfile.is_zipfile(path):  # else torch.load says what is wrong
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise ValueError(f"{record} is not what was written")
