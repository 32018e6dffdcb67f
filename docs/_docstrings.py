"""Docstrings and signatures, as the reference shows them."""

import re
from typing import Any

import griffe


class Reference(griffe.Extension):
    """Show an `Example:` as code, and leave the private fields out of dataclasses."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Give the section the name that Griffe knows; cut what is not for a class."""
        if obj.docstring is not None:
            value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
            if obj.name == "__init__":  # its first line would be amid the class's
                value = value[max(value.find("Args:"), 0) :]
            obj.docstring.value = value

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Remove the fields, before Griffe makes the signature of them."""
        for name, member in list(cls.members.items()):
            if name.startswith("_") and member.is_attribute:
                cls.del_member(name)
