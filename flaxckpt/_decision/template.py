"""The filepath template: parsed once at construction, filled in at each save."""

import functools
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flaxckpt._decision.logs import Unusable, find, normalized
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.reserved import ADVICE, is_reserved
from flaxckpt.errors import SettingError, TemplateError

_TOO_WIDE = re.compile(r"\d{4}")
_REFUSAL_OF_WIDTH = "no file name has a width or precision of four digits"
_NUMBER = ".*(?:[0-9]|nan|inf|NAN|INF).*"
_BARE_NUMBER = "[-+ ]*(?:[0-9][0-9.,_e+-]*|nan|inf)%?"


@dataclass(frozen=True)
class Template:
    """A filepath such as `runs/{epoch:02d}-{val_loss:.2f}`, checked and split.

    Attributes:
        text: The template, absolute, with `~` expanded.
        root: The directory below which all its checkpoints lie: the text up to the last
            separator in front of the first field.
        name: The text after `root`. It names a series of checkpoints, even if `root` is
            moved.
        fields: Names of the fields, in order, each once.
        label: The name of the template in errors.
    """

    text: str
    root: str
    name: str
    fields: tuple[str, ...]
    label: str

    @classmethod
    def parse(
        cls, filepath: str | os.PathLike[str], label: str | None = None
    ) -> "Template":
        """Check a template's syntax and split it.

        Args:
            filepath: A path with fields in Python's format syntax. A relative path
                begins at the present working directory.
            label: The name of the template in errors; None for its text.

        Returns:
            The template.

        Raises:
            SettingError: If it is no path.
            TemplateError: If the text is empty, a URL or the root directory, or has
                malformed braces; if a field is empty or a number, looks up an attribute
                or an index, or has a format spec that cannot work or a width that no
                file name has; or if a name is one of flaxckpt's own, or is '.' or '..'
                after a field.
        """
        if not isinstance(filepath, str | bytes | os.PathLike):
            shown = f"<{type(filepath).__name__}>"
            raise SettingError("filepath", shown, "pass the path to save at first.")
        raw = os.fspath(filepath)
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise TemplateError(str(raw), "must be a non-empty path as text.")
        if "://" in raw:
            raise TemplateError(
                raw, "is a URL of another kind than gs:// and s3://. Mount it."
            )
        fields = tuple(dict.fromkeys(_fields(raw, raw)))
        if not fields:
            root, name = os.path.split(os.path.abspath(os.path.expanduser(_plain(raw))))
            if not name:
                raise TemplateError(raw, "is the root directory. Name one below it.")
            name = _escaped(name)
        else:
            # A field's name or spec may hold separators: only literal text is a path.
            first = raw.replace("{{", "\0\0").index("{")
            cut = raw[:first].rfind("/") + 1
            root = os.path.abspath(os.path.expanduser(_plain(raw[:cut]) or "."))
            name = _without_empty_names(raw[cut:].rstrip("/"))
        names = _outline(name).split("/")
        if {".", ".."} & set(names):
            raise TemplateError(
                raw, "has a '.' or '..' behind a field. Write the path without them."
            )
        if any(map(is_reserved, (os.path.basename(root), *names))):
            raise TemplateError(raw, f"has {ADVICE}")
        text = os.path.join(_escaped(root), name)
        return cls(text, root, name, fields, label or text)

    @functools.cached_property
    def depth(self) -> int:
        """How many levels below `root` the checkpoints lie: 1 is directly in it."""
        return _outline(self.name).count("/") + 1

    def render(self, at: Moment, logs: Mapping[str, Any] | None) -> str:
        """Fill the fields in.

        Args:
            at: The moment, of ints. Epoch and batch are shown one-based, a step as it
                is; at the end of an epoch `{batch}` has nothing to show.
            logs: The other fields' values: numbers, scalar arrays or text; see `logs`.
                `render` waits only for the values that it shows, and ignores the keys
                `epoch` and `batch`, and `step` if the moment has one.

        Returns:
            The checkpoint's absolute path.

        Raises:
            SettingError: If `logs` is no mapping of names to metrics.
            TemplateError: If a field has no value, a value does not fit its format
                spec or has a separator, or the result is not `depth` proper names below
                `root` or has one of flaxckpt's own.
        """
        if not self.fields:
            return self._fixed
        values = normalized(logs)
        for field in self.fields:
            if (name := find(values, field)) != field:
                values[field] = values[name]
        for name in ("epoch", "batch"):
            values.pop(name, None)
        values |= at.fields
        missing = [field for field in self.fields if field not in values]
        if missing:
            end = " ({batch} has none at the end of an epoch)"
            if at.step is not None and {"epoch", "batch"} & {*missing}:
                end = " (a call with a step has no epoch and no batch)"
            elif "batch" not in missing:
                end = ""
            raise TemplateError(
                self.label,
                f"no value for {', '.join(map(repr, missing))}"
                f"{end}; fields there are: "
                f"{', '.join(sorted(map(str, values)))}. Put what is missing into "
                "`logs`, or take it out of the filepath.",
            )
        return self._filled(values)

    @functools.cached_property
    def _fixed(self) -> str:
        """The path that a template without fields always gives."""
        return self._filled({})

    @functools.cached_property
    def _pieces(self) -> list[tuple[str, str | None, str | None, str | None]]:
        return list(string.Formatter().parse(self.name))

    def _filled(self, values: Mapping[str, Any]) -> str:
        parts: list[str] = []
        for literal, field, spec, conversion in self._pieces:
            parts.append(literal)
            if field is not None:
                parts.append(self._show(field, spec or "", conversion, values))
        name = "".join(parts)
        names = name.split("/")
        if not name.strip() or {"", ".", ".."} & set(names) or len(names) != self.depth:
            problem = f"gives {name!r}, which is no file name."
            if self.depth > 1:
                problem = (
                    f"gives {name!r}, in which a name is empty, '.' or '..'. Change "
                    "what `logs` holds, or the filepath."
                )
            raise TemplateError(self.label, problem)
        if any(map(is_reserved, names)):
            raise TemplateError(self.label, f"gives {name!r}, with {ADVICE}")
        return os.path.join(self.root, name)

    def fits(self, parts: Sequence[str]) -> bool:
        """Tell whether a path below `root` looks like a checkpoint's, or is above one.

        Each field must show a number: a path with a field of mere text does not fit.

        Args:
            parts: The path's names, from `root` on.
        """
        return self._match(_NUMBER, parts)

    def may_give(self, parts: Sequence[str]) -> bool:
        """Tell whether the template gives a path below `root` for some numbers.

        Args:
            parts: The path's names, from `root` on.
        """
        return len(parts) == self.depth and self._match(_BARE_NUMBER, parts)

    def _match(self, field: str, parts: Sequence[str]) -> bool:
        pattern = "".join(
            re.escape(text) + ("" if name is None else field)
            for text, name, *_ in self._pieces
        )
        pairs = zip(pattern.split("/"), parts, strict=False)
        return all(re.fullmatch(own, part, re.DOTALL) for own, part in pairs)

    def _show(
        self, field: str, spec: str, conversion: str | None, values: Mapping[str, Any]
    ) -> str:
        value = values[field]
        if isinstance(value, Unusable):
            raise TemplateError(
                self.label,
                f"what {{{field}}} should show {value.problem}. Put a number or a text "
                "into `logs`, or take the field out of the filepath.",
            )
        try:
            if spec or conversion:
                numbers = {key: _number(values[key]) for key in self.fields}
                spec = _FORMATTER.vformat(spec, (), numbers)
                value = _FORMATTER.convert_field(_number(value), conversion)
                text = _FORMATTER.format_field(value, spec)
            else:  # a float32 of 0.1 is shown as 0.1, not with the digits of a float64
                _number(value)
                text = str(value)
        except (ValueError, TypeError) as error:
            shown = f"{field}!{conversion}" if conversion else field
            raise TemplateError(
                self.label,
                f"{{{shown}{':' + spec if spec else ''}}} cannot show "
                f"{values[field]!r}: {error}. Change the format spec, or what `logs` "
                "holds.",
            ) from error
        if "/" in text or os.sep in text or "\0" in text:
            raise TemplateError(
                self.label,
                f"field {{{field}}} gives {text!r}, which is no part of a file name.",
            )
        return text


class _Formatter(string.Formatter):
    """Python's formatter, which here refuses widths that would fill the memory."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if _TOO_WIDE.search(format_spec):
            raise ValueError(_REFUSAL_OF_WIDTH)
        return super().format_field(value, format_spec)


_FORMATTER = _Formatter()


def _number(value: Any) -> Any:
    """Return a scalar array's Python number; return other values as they are."""
    if not hasattr(value, "shape"):
        return value
    if value.shape != ():
        raise ValueError(f"it has shape {value.shape}, and only a scalar can be shown")
    return value.item()


def _fields(whole: str, text: str) -> Iterator[str]:
    """Yield the names of the fields in `text`, and of the fields in format specs."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise TemplateError(
            whole, f"{error}. Write {{{{ and }}}} for literal braces."
        ) from error
    for _, field, spec, conversion in parsed:
        if field is None:
            continue
        if not field or field.isdigit():
            raise TemplateError(
                whole,
                f"field {{{field}}} has no name. Name each field: {{epoch}}, {{batch}} "
                "or a key of `logs`.",
            )
        if "." in field or "[" in field:
            raise TemplateError(
                whole,
                f"field {{{field}}} looks up an attribute or an index. Use plain names:"
                " {epoch}, {batch} or a key of `logs`.",
            )
        if "{" not in (spec or "") and _TOO_WIDE.search(spec or ""):
            raise TemplateError(
                whole, f"field {{{field}}}: {_REFUSAL_OF_WIDTH}. Take a smaller one."
            )
        if conversion not in (None, "r", "s", "a") or not _shows_something(spec or ""):
            raise TemplateError(
                whole,
                f"field {{{field}}} has a conversion or format spec that Python does "
                "not know. See the format specification of Python's `str.format`.",
            )
        yield field
        yield from _fields(whole, spec or "")


def _shows_something(spec: str) -> bool:
    """Tell whether a format spec fits an int, a float or a text."""
    if "{" in spec:
        return True  # it is complete only with the values of its own fields
    for value in (1, 1.0, ""):
        try:
            format(value, spec)
        except (ValueError, TypeError):
            continue
        return True
    return False


def _outline(name: str) -> str:
    """Return a template's literal text, with a NUL for each field."""
    parsed = string.Formatter().parse(name)
    return "".join(
        text + ("\0" if field is not None else "") for text, field, *_ in parsed
    )


def _without_empty_names(name: str) -> str:
    """Return a template with each run of slashes in its literal text made one slash."""
    if "//" not in _outline(name):
        return name
    parts: list[str] = []
    for literal, field, spec, conversion in string.Formatter().parse(name):
        parts.append(re.sub("/+", "/", _escaped(literal)))
        if field is not None:
            shown = f"{field}!{conversion}" if conversion else field
            parts.append(f"{{{shown}:{spec}}}" if spec else f"{{{shown}}}")
    return "".join(parts)


def _plain(literal: str) -> str:
    return literal.replace("{{", "{").replace("}}", "}")


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
