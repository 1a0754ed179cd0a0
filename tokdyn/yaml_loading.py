"""Load YAML that may come from strangers: as many values and levels as the limits allow, and never a Python object.

An alias costs a few bytes and stands for a whole list, so that ten levels of aliases stand for more values than any
memory holds. Values are therefore counted while nodes are composed, before anything is built from them.
"""

from __future__ import annotations

from typing import Any

import yaml

from tokdyn.limits import YAML_DEPTH, YAML_NODES
from tokdyn.reading import one_line

_TEXT = 64  # characters of a text that count as one more value, because an alias repeats them, too


class LimitedLoader(yaml.SafeLoader):
    """Reads safe YAML within the limits. Everything that is wrong with a text is a `yaml.YAMLError`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and what is in it; raise an error where they are too many or too deep."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._nodes
        self._depth += 1
        self._require(YAML_DEPTH.excess(self._depth), event)
        if not isinstance(event, yaml.AliasEvent):
            self._nodes += 1 + len(getattr(event, "value", None) or "") // _TEXT
            self._require(YAML_NODES.excess(self._nodes), event)
        node: yaml.Node | None = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[id(node)] = self._nodes - before
        elif id(node) not in self._sizes:
            self._require(f"*{event.anchor}, which contains itself", event)
        else:
            self._nodes += self._sizes[id(node)]
            self._require(YAML_NODES.excess(self._nodes), event)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; where its text does not suit its tag, raise an error with the place."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"this cannot be read as {node.tag.rpartition(':')[2]} ({one_line(error, 80)})"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark) from error

    @staticmethod
    def _require(excess: str | None, event: yaml.Event) -> None:
        """Raise an error at the place of an event if there is an excess."""
        if excess:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=f"it holds {excess}", problem_mark=mark)


def load_yaml(text: str) -> Any:
    """Load a YAML text with the types of PyYAML's safe loader.

    Raises:
        yaml.YAMLError: the text is no YAML, or exceeds a limit.
    """
    return yaml.load(text, Loader=LimitedLoader)
