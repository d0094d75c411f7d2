"""Checkpoint files: read without running their code, their weights found and copied into a network."""

import pickle
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from .errors import ConfigError, WeightsError
from .networks import ARCHITECTURES, build, head_of
from .storage import check_records

State = dict[str, torch.Tensor]

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into names, anywhere."""

OTHER_STATE = ("optim", "sched", "scaler", "loops", "callbacks")
"""Containers with tensors that are no weights."""


@dataclass
class Weights:
    """Pretrained weights by the names that their network gives them.

    Attributes:
        arch: the network they fit.
        state: the weights.
        found: where in the file they were, and what beside them was not taken; empty for all of it.
        share: how many of the network's weights are among them, 0 to 1.
    """

    arch: str
    state: State
    found: str = ""
    share: float = 1.0


@dataclass
class Candidate:
    """Tensors of a checkpoint that may be a network's weights.

    Attributes:
        place: the containers' names, and the prefix of the weights' names in them.
        state: the weights, without the prefix.
        beside: names in the same container without the prefix.
        matches: how many of the network's weights are there in their shape.
    """

    place: str
    state: State
    beside: list[str] = field(default_factory=list)
    matches: int = 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a .pt/.pth file (tensors and plain values only: no code is run) or .safetensors.

    Raises:
        WeightsError: the file is missing, truncated or damaged, or holds more than weights.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder: name a checkpoint in it")
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}")
    if reason := what_else(path):
        raise WeightsError(f"{path} is damaged or not a checkpoint: {reason}")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise WeightsError(f"{path}: reading it needs `pip install safetensors`") from error
            return load_file(path)
        check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        # The rest of the message tells how to run whatever code a file brings along.
        found = re.search(
            r"WeightsUnpickler error:\s*(.+?)(?= was not an allowed global|$)", str(error), re.M
        )
        reason = found[1] if found else str(error).splitlines()[0]
        if (
            "torchvision.models" in reason
            or "torch.nn.modules" in reason
            or "timm.models" in reason
        ):
            reason = f"a whole model was saved, not its weights alone ({reason})"
        raise WeightsError(
            f"{path} is damaged or holds more than weights: {reason}; weights alone are what "
            "torch.save(model.state_dict(), FILE) writes"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        if "TorchScript" in str(error):
            reason = "it is a TorchScript program: torch.jit.load it and save its state_dict()"
        elif " " not in reason:  # a KeyError's is a number
            reason = "torch.load cannot read it"
        raise WeightsError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}: expected weights by name")
    return dict(content)


def what_else(path: Path) -> str | None:
    """What a file is that begins as no checkpoint does."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, saved in the place of a download"
    if start.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as Keras writes them"
    return None


def containers(content: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[Candidate]:
    """Every mapping within `content` that has tensors by name."""
    state: State = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            state.setdefault(name, value)
    if state:
        yield Candidate(place, state)
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < 4:
            if not any(word in str(name).lower() for word in OTHER_STATE):
                yield from containers(value, f"{place}.{name}" if place else str(name), depth + 1)


def is_averaged(name: str) -> bool:
    """Whether a container or prefix is called EMA, alone or as a part of its name."""
    return re.search(r"(?<![a-z])ema(?![a-z])", name.lower()) is not None


@cache
def reference(arch: str) -> tuple[State, str]:
    """An architecture's weights by name (their values mean nothing), and the prefix of its head's."""
    try:
        with torch.device("meta"):
            model = build(arch, 2)
    except NotImplementedError:  # some compute their widths with tensors
        with torch.random.fork_rng():
            model = build(arch, 2)
    return model.state_dict(), head_of(model) + "."


def prefixed(candidate: Candidate, model: State, head: str) -> Candidate:
    """The candidate without the prefix under which most of the model's weights are."""
    own = [name for name in model if not name.startswith(head)]
    prefixes = {""}
    for probe in own[:1] + own[len(own) // 2 :][:1] + own[-1:]:
        prefixes |= {k[: -len(probe)] for k in candidate.state if k.endswith("." + probe)}

    def count(prefix: str) -> int:
        found = (candidate.state.get(prefix + name) for name in own)
        return sum(
            v is not None and v.shape == model[n].shape for n, v in zip(own, found, strict=True)
        )

    order = {name: i for i, name in enumerate(candidate.state)}
    first = {p: min((i for k, i in order.items() if k.startswith(p)), default=0) for p in prefixes}
    best = max(prefixes, key=lambda p: (count(p), is_averaged(p), -first[p]))
    state = {k.removeprefix(best): v for k, v in candidate.state.items() if k.startswith(best)}
    beside = [k for k in candidate.state if not k.startswith(best)]
    place = candidate.place + (f" under the prefix {best!r}" if best else "")
    return Candidate(place, state, beside, count(best))


def locate(content: Mapping[str, Any], arch: str, source: str) -> Weights:
    """The weights of `arch` wherever they are in a checkpoint: averaged ones where it has both.

    Raises:
        WeightsError: there are none.
    """
    model, head = reference(arch)
    candidates = [prefixed(c, model, head) for c in containers(content)]
    if not candidates:
        names = ", ".join(map(str, list(content)[:4]))
        raise WeightsError(f"{source} holds no weights{f', but {names}' if names else ''}")
    most = max(c.matches for c in candidates)
    fitting = [c for c in candidates if c.matches == most]
    averaged = [c for c in fitting if is_averaged(c.place)]
    best = (averaged or fitting)[0]
    said = [("in " if best.place[0] != " " else "") + best.place.strip()] if best.place else []
    if best.beside:
        more = f" and {len(best.beside) - 3} more" if len(best.beside) > 3 else ""
        said.append(f"not used: {', '.join(best.beside[:3])}{more}")
    others = [c.place.strip() or "the weights outside" for c in fitting if c is not best]
    if most and others:
        said.append(f"not used: {', '.join(others)}")
    return Weights(arch, best.state, "; ".join(said), most / max(1, len(model)))


def identify(content: Mapping[str, Any], source: str) -> Weights:
    """The weights of a checkpoint whose architecture is told by their names and shapes.

    Raises:
        WeightsError: it is of none that is known.
    """
    named = content.get("arch")
    if isinstance(named, str):
        try:
            weights = locate(content, named, source)
            if not differences(weights.state, *reference(named)):
                return weights
        except ConfigError:
            pass
    candidates = list(containers(content))
    if not candidates:
        locate(content, "small", source)  # which says what there is
    size = max(count_values(c.state) for c in candidates)
    sizes = {arch: abs(size - known_size(arch)) for arch in ARCHITECTURES}
    closest, share, reasons = "", 0.5, [""]
    for arch in sorted(sizes, key=lambda name: sizes[name])[:NEAREST]:
        weights = locate(content, arch, source)
        if not (found := differences(weights.state, *reference(arch))):
            return weights
        if weights.share > share:
            closest, share, reasons = arch, weights.share, found
    if closest:
        raise WeightsError(f"{source} is nearly of {closest}, but {'; '.join(reasons)}")
    largest = max(candidates, key=lambda c: len(c.state)).state
    names = ", ".join(list(largest)[:3])
    raise WeightsError(
        f"{source} is of none of torchvision's architectures ({len(largest)} tensors: {names}, ...): "
        "name it with --arch"
    )


NEAREST = 12
"""Architectures of a similar size that a checkpoint without a name is compared with."""


def count_values(state: Mapping[str, torch.Tensor]) -> int:
    """The values of the weights, without statistics and counters."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(v.numel() for k, v in state.items() if not k.endswith(statistics))


def known_size(arch: str) -> int:
    """The number of parameters that torchvision's documentation gives."""
    if arch == "small":
        return 175_000
    return torchvision.models.get_model_weights(arch).DEFAULT.meta["num_params"]


def find_weights(arch: str | None, weights: str) -> Weights | None:
    """The weights that `weights` stands for.

    Args:
        arch: None to tell it from the weights.
        weights: "DEFAULT" (the shipped checkpoint for small, torchvision's download otherwise),
            "none", or a file with a state_dict, bare or in any container (see locate).

    Raises:
        WeightsError: the file cannot be read or holds no weights, or the download failed.
    """
    if weights == "none":
        return None
    if weights == "DEFAULT":
        if arch not in (None, "small"):
            return Weights(arch, download_weights(arch))
        with resources.as_file(resources.files(__package__) / "assets" / "resnet14.pt") as path:
            found = locate(read_checkpoint(path), "small", "the shipped checkpoint")
            return Weights(found.arch, found.state)
    content = read_checkpoint(Path(weights))
    found = identify(content, weights) if arch is None else locate(content, arch, weights)
    if broken := [
        k for k, v in found.state.items() if v.is_floating_point() and not v.isfinite().all()
    ]:
        raise WeightsError(f"{weights}: {broken[0]} is not finite: its training had diverged")
    return found


def download_weights(arch: str) -> dict[str, torch.Tensor]:
    """torchvision's best ImageNet weights, from its cache or the network.

    Raises:
        WeightsError: no network, or a damaged download.
    """
    entry = torchvision.models.get_model_weights(arch).DEFAULT
    patience = socket.getdefaulttimeout()
    # urlopen has no time limit of its own and would hang where packets are dropped.
    socket.setdefaulttimeout(patience or 20)
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise WeightsError(
            f"cannot download {arch} weights from {entry.url} ({error}): "
            "pass --weights FILE, or --weights none to train from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def differences(
    state: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], head: str | None
) -> list[str]:
    """In what weights differ from those of a model: lists of names, each with its title.

    Args:
        head: the prefix of names that are not compared.
    """

    def compared(name: str) -> bool:
        return (head is None or not name.startswith(head)) and not name.startswith(AUXILIARY)

    # Checkpoints from before torch 0.4.1 lack the counters.
    missing = [
        k for k in model if compared(k) and k not in state and not k.endswith("num_batches_tracked")
    ]
    unexpected = [k for k in state if compared(k) and k not in model]
    both = [k for k in model if compared(k) and k in state]
    reshaped = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(model[k].shape)}"
        for k in both
        if state[k].shape != model[k].shape
    ]
    quantized = [
        f"{k} {state[k].dtype}"
        for k in both
        if model[k].is_floating_point() and not state[k].is_floating_point()
    ]
    lists = {"missing": missing, "unknown": unexpected, "shape": reshaped, "dtype": quantized}
    found = []
    for title, names in lists.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            found.append(f"{title}: {', '.join(names[:4])}{more}")
    return found


AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""The heads beside the head of torchvision's GoogLeNet and Inception, which are not built here."""


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], *, head: bool) -> None:
    """Copy weights into `model`, all names and shapes matching.

    Args:
        head: False leaves the last layer as it is: it belongs to the new classes.

    Raises:
        WeightsError: names or shapes differ; the message names them. `model` is then unchanged.
    """
    own = model.state_dict()
    skipped = None if head else head_of(model) + "."
    if found := differences(state, own, skipped):
        raise WeightsError("the weights are of another architecture; " + "; ".join(found))
    taken = {k: v for k, v in state.items() if k in own and not (skipped and k.startswith(skipped))}
    model.load_state_dict({**own, **taken}, strict=False)
