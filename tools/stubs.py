"""Writes the .pyi files of what is made when it is imported: fastops._C from what the extension says of its own functions,
fastops.autograd and fastops.nn from the table of ops, fastops.optim from its signatures. `make stubs`, after any of these
gained a name. Then mypy.stubtest compares the extension's with the extension."""

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


import fastops.nn  # noqa: E402
import fastops.optim  # noqa: E402
from fastops import _C, autograd  # noqa: E402
from fastops._core.registry import KERNELS, overload  # noqa: E402

WRITTEN = "# Written by tools/stubs.py (`make stubs`).\n"
STUB = ROOT / "fastops" / "_C.pyi"
HEAD = "# Written by tools/stubs.py (`make stubs`).\nfrom collections.abc import Callable, Sequence\n\nimport torch\n"
PLAIN = {
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "fastops._C.": "",
    "collections.abc.Callable": "Callable[..., object]",
    "collections.abc.Sequence": "Sequence",
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


OF_SCHEMA = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "Tensor | None",
    "float": "float",
    "int": "int",
}


def autograd_stub() -> str:
    """fastops.autograd: a Function for every row, whose apply() takes the arguments of the row's schema."""
    lines = [WRITTEN + "from torch import Tensor", "from torch.autograd import Function", ""]
    lines += ["def class_name(row: str) -> str: ..."]
    names = {autograd.class_name(row): row for row in KERNELS}
    for name in autograd.__all__:
        arguments = [a for a in overload(names[name])._schema.arguments if a.name != "upcast"]
        written = []
        for a in arguments:
            default = f" = {a.default_value!r}" if a.has_default_value() else ""
            written.append(f"{a.name}: {OF_SCHEMA[str(a.type)]}{default}")
        given = ", ".join(["cls", *written, "/"])
        lines += [f"class {name}(Function):", f'    """{getattr(autograd, name).__doc__}"""']
        lines += ["    @classmethod"]
        lines += [f"    def apply({given}) -> Tensor: ...  # type: ignore[override]"]
    return "\n".join(lines) + "\n"


def nn_stub() -> str:
    """fastops.nn: the classes, and torch.nn's names. With docstrings, which the reference is made from."""
    lines = [WRITTEN + "from typing import Any", "", "import torch", ""]
    lines += ["MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]]", ""]
    lines += ["def __getattr__(name: str) -> Any: ...", ""]
    for name in fastops.nn.__all__:
        cls = getattr(fastops.nn, name)
        base = cls.__mro__[1].__name__
        lines += [f"class {name}(torch.nn.{base}):", f'    """{cls.__doc__}"""']
        if "__init__" in vars(cls):
            own = [
                p for p in inspect.signature(cls).parameters.values() if p.annotation is not p.empty
            ]
            for p in own:
                lines.append(f"    {p.name}: {p.annotation}")
            given = ", ".join(f"{p.name}: {p.annotation} = {p.default!r}" for p in own)
            lines.append(f"    def __init__(self, *args: Any, {given}, **kwargs: Any) -> None: ...")
    return "\n".join(lines) + "\n"


def optim_stub() -> str:
    """fastops.optim: every optimizer with the whole of its signature."""
    names = [n for n in fastops.optim.__all__ if isinstance(getattr(fastops.optim, n), type)]
    others = [n for n in fastops.optim.__all__ if n not in names]
    lines = [WRITTEN + "from typing import Any", "", "import torch", "from torch import Tensor", ""]
    for name in others:
        source = getattr(fastops.optim, name).__module__.rpartition(".")[2]
        lines.append(f"from .{source} import {name} as {name}")
    lines += ["from .step import FusedStep", "", "def __getattr__(name: str) -> Any: ...", ""]
    for name in names:
        cls = getattr(fastops.optim, name)
        base = next(c for c in cls.__mro__ if c.__module__.startswith("torch.optim"))
        lines.append(f"class {name}(FusedStep, torch.optim.{base.__name__}):")
        written, star = [], False
        for p in inspect.signature(cls).parameters.values():
            if p.kind is p.KEYWORD_ONLY and not star:
                written, star = [*written, "*"], True
            default = "" if p.default is p.empty else f" = {default_of(p.default)}"
            written.append(f"{p.name}: {type_of(p)}{default}")
        lines.append(f"    def __init__(self, {', '.join(written)}) -> None: ...")
    return "\n".join(lines) + "\n"


def default_of(value: object) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | tuple | None) else "..."


def type_of(p: inspect.Parameter) -> str:
    """What a parameter of an optimizer takes: by its default, since torch's own annotations name types of torch.optim's."""
    if p.default is p.empty:
        return "Any"
    if p.name == "lr":
        return "float | Tensor"
    if isinstance(p.default, bool):
        return "bool"
    if isinstance(p.default, int | float):
        return "float"
    if isinstance(p.default, str):
        return "str"
    if isinstance(p.default, tuple):
        return "tuple[float | Tensor, ...]"
    return "Any"


STUBS = {
    STUB: stub,
    ROOT / "fastops" / "autograd.pyi": autograd_stub,
    ROOT / "fastops" / "nn" / "__init__.pyi": nn_stub,
    ROOT / "fastops" / "optim" / "__init__.pyi": optim_stub,
}


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
    """Writes the files, formats them and has the extension's checked; returns the checker's exit code."""
    for file, write in STUBS.items():
        file.write_text(write())
    files = list(map(str, STUBS))
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--fix", *files], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *files], check=True)
    done = stubtest()
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
