"""Whether a JSON schema has a finite value: one that contains itself in every value can never be finished.

The grammar library compiles such a schema without complaint; what is generated under it would never end, or
be nothing at all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_step35.chat.arguments import resolve

Schema = Mapping[str, Any]


def has_finite_value(schema: Any, root: Schema) -> bool:
    """Whether some value of the schema ends; `root` is what its references are resolved in."""
    references = _references(schema, root)
    # Grows from what ends without any reference: least fixed point, so a cycle does not prove itself.
    finite: set[str] = set()
    while True:
        found = {
            name for name, target in references.items() if name not in finite and _ends(target, root, finite)
        }
        if not found:
            return _ends(schema, root, finite)
        finite |= found


def _ends(schema: Any, root: Schema, finite: set[str]) -> bool:
    if not isinstance(schema, Mapping):
        return schema is not False
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in finite:
        return False
    if "const" in schema or isinstance(schema.get("enum"), list):
        return True
    if not all(_ends(part, root, finite) for part in _parts(schema, "allOf")):
        return False
    for keyword in ("anyOf", "oneOf"):
        parts = _parts(schema, keyword)
        if parts and not any(_ends(part, root, finite) for part in parts):
            return False
    declared = schema.get("type")
    types = declared if isinstance(declared, list) else [declared]
    if types == ["object"]:
        return _object_ends(schema, root, finite)
    if types == ["array"]:
        return _array_ends(schema, root, finite)
    # Of several types at least one is a scalar, or both containers are: rare enough to be let through.
    return True


def _object_ends(schema: Schema, root: Schema, finite: set[str]) -> bool:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    other = schema.get("additionalProperties")
    required = [name for name in schema.get("required") or () if isinstance(name, str)]
    if not all(_ends(properties.get(name, other), root, finite) for name in required):
        return False
    if required or not schema.get("minProperties"):
        return True
    return any(_ends(value, root, finite) for value in [*properties.values(), other])


def _array_ends(schema: Schema, root: Schema, finite: set[str]) -> bool:
    least = schema.get("minItems") or 0
    first = _parts(schema, "prefixItems")
    needed = [*first[: int(least)], *([schema.get("items")] if least > len(first) else [])]
    return all(_ends(item, root, finite) for item in needed)


def _parts(schema: Schema, keyword: str) -> list[Any]:
    parts = schema.get(keyword)
    return parts if isinstance(parts, list) else []


def _references(schema: Any, root: Schema) -> dict[str, Any]:
    """Every reference that can be reached, with what it names."""
    found: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        for reference in _mentioned(waiting.pop()):
            if reference not in found:
                found[reference] = resolve(reference, root)
                waiting.append(found[reference])
    return found


def _mentioned(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
