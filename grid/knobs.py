"""``along``: a defense at several settings of one knob, as entries of their own.

``anp: {along: {threshold: [0.1, 0.2]}}`` stands for ``anp@threshold=0.1`` and
``anp@threshold=0.2``. The board then says what the knob can buy: the attack success that is left
at so many points of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from grid.nodes import Raw
from grid.spec import Knob

RECIPE = "recipe."


def expanded(item: Raw) -> Iterator[tuple[Raw, Knob | None]]:
    """An item of a list of defenses, once per value of its knob if it has one."""
    entries = item.items() if isinstance(item.node.data, Mapping) else {}
    name, given = next(iter(entries.items()), ("", item))
    if len(entries) != 1 or not isinstance(given.node.data, Mapping):
        yield item, None
        return
    along = given.items().get("along")
    if along is None:
        yield item, None
        return
    label = given.items()["as"].node.text if "as" in given.items() else name
    knob, values = _knob(along)
    is_recipe = knob.startswith(RECIPE)
    own = given.without("along")
    field = knob.removeprefix(RECIPE)
    place = own.items().get("recipe") if is_recipe else own
    if place is not None and field in place.items():
        raise place.items()[field].error(f"{knob} is the knob of `along`: give it there alone")
    for value in values:
        setting = {field: value.plain()}
        if is_recipe:
            setting = {"recipe": {**(place.plain() if place is not None else {}), **setting}}
        found = Knob(of=label, name=knob, value=value.node.text)
        more = own.under({**setting, "as": found.label})
        yield Raw.of({name: more.plain()}, value.where), found


def _knob(along: Raw) -> tuple[str, list[Raw]]:
    knobs = along.items()
    if len(knobs) != 1:
        raise along.error(
            "one knob at a time, such as along: {threshold: [0.1, 0.2]}. Got:"
            f" {', '.join(knobs) or 'nothing'}."
        )
    ((name, raw),) = knobs.items()
    values = raw.elements()
    for value in values:
        if isinstance(value.node.data, Mapping | tuple):
            raise value.error(f"a knob's values are numbers or words, got {value.show()}")
    texts = [value.node.text for value in values]
    if len(values) < 2 or len(set(texts)) < len(texts):
        raise raw.error(f"a knob needs two or more values, all different; got {', '.join(texts)}")
    return name, values
