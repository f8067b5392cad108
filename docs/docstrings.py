# SPDX-License-Identifier: Apache-2.0
"""Docstrings as the site shows them: an extension of griffe, which reads them for mkdocstrings."""

import re

try:
    from griffe import Extension
except ModuleNotFoundError:  # without the extra `docs` there is nothing to extend
    Extension = object

SECTION = re.compile(r"(Args|Returns|Raises|Yields):")


class Readable(Extension):
    """Mends every docstring by `markdown`, and ends that of a NamedTuple with its fields."""

    def on_object(self, *, obj, **kwargs):
        """Called for every object once all are read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
            if obj.is_class and any(str(base) == "NamedTuple" for base in obj.bases):
                obj.docstring.value += fields(
                    {name: field.lines for name, field in obj.attributes.items()}
                )


def markdown(text: str) -> str:
    """The docstring with <, > and * as characters, and without what looks like an admonition.

    `<x, w>` is no tag, `>= 0` no quotation. The line `rate: >= 0 ...` and the indented lines after
    it are a paragraph; only Args, Returns, Raises and Yields are sections. Code keeps its
    characters.
    """
    shown, in_section = [], False
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if lines and not lines[0].startswith(" "):
            in_section = SECTION.fullmatch(lines[0]) is not None
        if in_section:
            shown.append(_escaped(paragraph))
        elif all(line.startswith("    ") for line in lines):
            shown.append(paragraph)
        else:
            shown.append(_escaped("\n".join(line.strip() for line in lines)))
    return "\n\n".join(shown)


def fields(lines: dict[str, list[str]]) -> str:
    """A section with each field, told by the comment at the end of its line.

    lines: field -> its lines in the source.
    """
    told = [
        f"    {name}: {_escaped(source[-1].partition('  # ')[2])}"
        for name, source in lines.items()
        if not name.startswith("_")
    ]
    return "\n".join(["\n\nAttributes:", *told]) if told else ""


def _escaped(text: str) -> str:
    """Characters of formulas as such, but for those between backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    for n, part in enumerate(parts[::2]):
        part = part.replace("<", "&lt;").replace(">", "&gt;")
        parts[2 * n] = re.sub(r"(?<=\w)\*", "&#42;", part)  # as in w*
    return "".join(parts)
