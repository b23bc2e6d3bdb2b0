"""One name of vLLM, and what is relied on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of vLLM and what is relied on.

    module, name: dotted module, and the qualified name in it ("" for the module itself)
    why: what the plugin does there
    leading: a function's first parameters in this order, without self: they come by position
    takes: parameters that are passed or read by name, at whatever position
    exact: all parameters, where the plugin puts a function of its own signature in its place
    has: attributes of a class, its instances or a module: methods, fields, enum members
    returns: how many values the returned tuple has
    since: the first version that has it; the plugin does without in those before
    optional: the plugin does without wherever it is absent, but what is there must be as said
    """

    module: str
    name: str
    why: str
    leading: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    exact: tuple[str, ...] | None = None
    has: tuple[str, ...] = ()
    returns: int = 0
    since: str = ""
    optional: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module

    @property
    def attribute(self) -> str:
        """The last part of the name: what is looked up on its owner."""
        return self.name.rpartition(".")[2]
