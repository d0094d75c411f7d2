"""For mkdocs: what the docstrings have of reStructuredText (roles, links), as Markdown."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr):`~?([^`]+)`")
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")


class Roles(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = LINK.sub(r"[\1](\2)", obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
