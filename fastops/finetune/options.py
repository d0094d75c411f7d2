"""The options of FineTuneConfig on a command line, and as a table of the documentation."""

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from .config import FineTuneConfig, read_options, split_list


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name}".replace("_", "-")


def describe(entry: Field) -> str:
    """What an option is for, with its default."""
    text = entry.metadata["help"]
    if entry.default is None or isinstance(entry.default, bool):
        return text
    return f"{text} (default: {entry.default})"


def add_options(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """Add an option for each field; the groups by name, for more of them."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for entry in fields(FineTuneConfig):
        title = entry.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = [flag(entry.name)] + ["--mode"] * (entry.name == "modes")
        options: dict[str, Any] = {"help": describe(entry).replace("%", "%%"), "default": None}
        if entry.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = entry.metadata["metavar"]
            options["type"] = parse_as(entry)
        if entry.name == "augment":
            options.update(nargs="?", const="light")
        groups[title].add_argument(*names, **options)
    return groups


def parse_as(entry: Field) -> Any:
    """What turns an option's text into its value."""
    if entry.name == "modes":
        return split_list
    if entry.name == "threads":
        return lambda text: text if text == "auto" else int(text)
    kinds: dict[Any, Any] = {int: int, int | None: int, float: float, float | None: float}
    return kinds.get(entry.type, str)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The values that were given, in the file of --config or beside it, which wins.

    Raises:
        ConfigError: see read_options.
    """
    values = read_options(Path(options.config)) if options.config is not None else {}
    for entry in fields(FineTuneConfig):
        if (value := getattr(options, entry.name)) is not None:
            values[entry.name] = value
    return values


def table() -> str:
    """The options in Markdown: a table for each group."""
    lines: list[str] = []
    title = None
    for entry in fields(FineTuneConfig):
        if entry.metadata["group"] != title:
            title = entry.metadata["group"]
            lines += ["", f"**{title[0].upper()}{title[1:]}**", "", "| option | |", "|---|---|"]
        value = f" {entry.metadata['metavar']}" if entry.metadata["metavar"] else ""
        lines.append(f"| `{flag(entry.name)}{value}` | {describe(entry)} |")
    return "\n".join(lines[1:]) + "\n"
