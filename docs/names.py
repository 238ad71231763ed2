"""Names of the library in the text of pages lead to their place in the API."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes

# Where a bare name is looked for, in this order.
PLACES = (
    "backpack.extensions",
    "backpack",
    "backpack.own",
    "backpack.vivit",
    "backpack.cockpit",
    "backpack.optim",
)
OPTIMIZERS_FIRST = ("optim", "howto/kfac", "experiments")


def _target(text: str, documented: dict[str, Any], page: str) -> str | None:
    """The full name that is meant by ``text``: a class as it is, anything else with its module."""
    name = re.sub(r"\(.*\)$", "", text, flags=re.DOTALL)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return None
    if "." in name:
        full = [name, f"backpack.{name}"]
        return next((each for each in full if each in documented), None)
    if not name[0].isupper():
        return None
    places = PLACES[::-1] if page in OPTIMIZERS_FIRST else PLACES
    return next((f"{place}.{name}" for place in places if f"{place}.{name}" in documented), None)


def _link(app: Any, doctree: nodes.document, page: str) -> None:
    if page.startswith("api/"):
        return
    documented = app.env.domaindata["py"]["objects"]
    for literal in list(doctree.findall(nodes.literal)):
        inside = literal.parent
        while inside is not None:
            if isinstance(inside, nodes.reference | nodes.title | addnodes.desc):
                break
            inside = inside.parent
        target = None if inside is not None else _target(literal.astext(), documented, page)
        if target is None:
            continue
        place = documented[target]
        address = app.builder.get_relative_uri(page, place.docname)
        reference = nodes.reference("", "", internal=True, refuri=f"{address}#{place.node_id}")
        reference["reftitle"] = target
        literal.replace_self(reference)
        reference += literal


def setup(app: Any) -> dict[str, bool]:
    """Link once all pages are read."""
    app.connect("doctree-resolved", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
