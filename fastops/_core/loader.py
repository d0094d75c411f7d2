"""Whether the extension fits this Python and this torch, told in a sentence. It is read here as a file, so that something
can be said of one that does not load."""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1]
REBUILD = (
    "build it again for this torch: `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree, "
    "or the wheel that was made for it"
)
_MARK = re.compile(rb"fastops built for torch ([\w.+-]{3,40})\n")  # csrc/torch/module.cpp
_FATBIN = struct.pack("<I", 0xBA55ED50)


def path() -> Path | None:
    """The file that `import fastops._C` would load, or None."""
    names = (FOLDER / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in names if file.is_file()), None)


def built_for(file: Path) -> str | None:
    """The version of torch that the extension in a file was built for; None where it does not say."""
    try:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _MARK.search(data)
            return found[1].decode() if found else None
    except (OSError, ValueError):  # ValueError: an empty file
        return None


def cuda_architectures(file: Path) -> list[str]:
    """What is in the file for GPUs, as torch.cuda.get_arch_list() writes it: "sm_90" machine code, "compute_120" PTX.

    nvcc wraps the code of each source in a fat binary: a magic number, and a header for each architecture.
    """
    found: Counter[tuple[int, str]] = Counter()
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = -1
        while (at := data.find(_FATBIN, at + 1)) >= 0:
            if at + 16 > len(data):
                break
            version, header, size = struct.unpack_from("<HHQ", data, at + 4)
            here, end = at + header, min(at + header + size, len(data))
            while version == 1 and header == 16 and here + 32 <= end:
                kind, _, header_size, code_size = struct.unpack_from("<HHIQ", data, here)
                (number,) = struct.unpack_from("<I", data, here + 28)
                if kind in (1, 2):
                    found[number, f"{'compute' if kind == 1 else 'sm'}_{number}"] += 1
                here += header_size + code_size
                if header_size + code_size == 0:
                    break
    return [name for _, name in sorted(found)]


def same_minor(a: str, b: str) -> bool:
    """Whether two versions of torch share their C++ interface: 2.14.0+cpu and 2.14.1 do."""
    return a.split(".")[:2] == b.split(".")[:2]


def why_not(torch_version: str, error: ImportError) -> str:
    """What keeps the extension from loading, and what to do."""
    file = path()
    if file is None:
        others = sorted(f.name for f in FOLDER.glob("_C.*") if f.suffix in (".so", ".pyd"))
        return f"fastops._C: there is none in {FOLDER} for this Python" + (
            f", only {', '.join(others)}; {REBUILD}"
            if others
            else "; build it: `make build`, or `pip install --no-build-isolation .`"
        )
    built = built_for(file)
    if built and built != torch_version:
        return f"fastops._C was built for torch {built}, this is torch {torch_version}; {REBUILD} ({error})"
    if built is None:
        return f"fastops._C does not load: {error}. {file} is damaged, or no build of fastops; {REBUILD}"
    return f"fastops._C does not load under torch {torch_version}, for which it was built: {error}"


def load(torch_version: str) -> ModuleType:
    """fastops._C.

    Raises:
        ImportError: it does not load, or was built for another minor version of torch; says what to do.
    """
    try:
        from .. import _C
    except ImportError as error:
        raise ImportError(why_not(torch_version, error), name="fastops._C") from error
    built = _C.torch_version()
    if not same_minor(built, torch_version):
        misread = ImportError("it loads, but would take torch's memory for that of another version")
        raise ImportError(why_not(torch_version, misread), name="fastops._C")
    return _C
