"""Writes fastops/_C.pyi from what the extension says of its own functions: `make stubs`, after C++ gained one. Then
mypy.stubtest compares the two."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastops import _C  # noqa: E402

STUB = ROOT / "fastops" / "_C.pyi"
HEAD = "# Written by tools/stubs.py (`make stubs`).\nfrom collections.abc import Callable\n\nimport torch\n"
PLAIN = {
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "fastops._C.": "",
    "collections.abc.Callable": "Callable[..., object]",
}
KNOWN = {"pool_info() -> dict": "pool_info() -> dict[str, int | bool]"}  # pybind11 says less


def signature(doc: str) -> str:
    """The first line of a pybind11 docstring as a line of a stub; arguments without a name are positional."""
    text = doc.splitlines()[0]
    text = KNOWN.get(text, text)
    for ours, theirs in PLAIN.items():
        text = text.replace(ours, theirs)
    text = re.sub(r"self: \w+", "self", text)
    text = re.sub(r" = [\w.]+", " = ...", text)
    if "arg0" in text:
        text = re.sub(r"\) ->", ", /) ->", text, count=1)
    return f"def {text}: ..."


def stub() -> str:
    """The text of the file."""
    classes, functions = [], []
    for name, value in sorted(vars(_C).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, type):
            classes.append(f"\nclass {name}:")
            for key, member in sorted(vars(value).items()):
                if isinstance(member, property):
                    kind = member.fget.__doc__.split("->")[1].strip()
                    classes += ["    @property", f"    def {key}(self) -> {kind}: ..."]
                elif callable(member) and (key == "__init__" or not key.startswith("_")):
                    classes.append("    " + signature(member.__doc__))
        elif callable(value):
            functions.append(signature(value.__doc__))
    return "\n".join([HEAD, *functions, *classes, ""])


def stubtest() -> subprocess.CompletedProcess[str]:
    """mypy.stubtest of the extension and the file, without following torch, which would take it a minute."""
    with tempfile.TemporaryDirectory() as folder:
        config, known = Path(folder, "mypy.ini"), Path(folder, "known")
        config.write_text("[mypy]\nfollow_imports = skip\n")
        known.write_text(r"fastops\._C\.OptimizerStepper" "\n")  # its metaclass is pybind11's own
        options = ["--mypy-config-file", str(config), "--allowlist", str(known)]
        return subprocess.run(
            [sys.executable, "-m", "mypy.stubtest", *options, "fastops._C"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip


def main() -> int:
    """Writes the file, formats it and has it checked; returns the checker's exit code."""
    STUB.write_text(stub())
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(STUB)], check=True)
    done = stubtest()
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
