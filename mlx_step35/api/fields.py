"""Reading JSON objects leniently but exactly: what is there must be right, null is absent.

Every refusal is a RequestError whose message starts with the path of the field, in the spelling of the
dialect: `tools[0].function.name` or `tools.0.name`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_step35.errors import RequestError, quoted


class Fields:
    """One JSON object of a request and the path that leads to it."""

    def __init__(self, values: Mapping[str, Any], path: str = "", *, is_dotted: bool = False) -> None:
        self.values = values
        self.path = path
        self._is_dotted = is_dotted

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def at(self, name: str) -> str:
        """The path of a member."""
        return f"{self.path}.{name}" if self.path else name

    def refuse(self, name: str, message: str, code: str = "invalid_value") -> RequestError:
        """The error for a member, to be raised."""
        path = self.at(name)
        return RequestError(f"{path}: {message}", path, code)

    def raw(self, name: str) -> Any:
        """A member as it is, None if absent."""
        return self.values.get(name)

    def require(self, name: str) -> Any:
        """A member that must be there."""
        value = self.values.get(name)
        if value is None:
            raise self.refuse(name, "Field required", "missing_required_parameter")
        return value

    def text(self, name: str) -> str | None:
        return None if name not in self else self.required_text(name)

    def required_text(self, name: str) -> str:
        value = self.require(name)
        if not isinstance(value, str):
            raise self.refuse(name, "must be a string", "invalid_type")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false", "invalid_type")
        return value

    def integer(self, name: str, least: int, most: int | None = None) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        # JSON has one kind of number: 5.0 is an integer.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, "must be an integer", "invalid_type")
        self._check_range(name, value, least, most, "integer")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "must be a number", "invalid_type")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(name, "must be a finite number")
        self._check_range(name, value, least, most, "decimal")
        return float(value)

    def choice(self, name: str, options: Sequence[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in options:
            raise self.refuse(name, f"must be one of {', '.join(options)}, not {quoted(value)}")
        return value

    def items(self, name: str) -> list[Any]:
        """A list; an absent one is empty."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(name, "must be a list", "invalid_type")
        return value

    def object(self, name: str) -> "Fields":
        """A member that must be an object."""
        return self._fields(self.require(name), self.at(name))

    def optional_object(self, name: str) -> "Fields | None":
        return self.object(name) if name in self else None

    def objects(self, name: str) -> "Iterator[Fields]":
        """The members of a list, each of which must be an object."""
        path = self.at(name)
        for index, value in enumerate(self.items(name)):
            yield self._fields(value, f"{path}.{index}" if self._is_dotted else f"{path}[{index}]")

    def texts(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """A list of strings that are not empty."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.refuse(name, "must be a list of strings", "invalid_type")
        if not all(values):
            raise self.refuse(name, "must not contain empty strings")
        if most is not None and len(values) > most:
            raise self.refuse(name, f"at most {most} entries, found {len(values)}", "array_above_max_length")
        return tuple(values)

    def _fields(self, value: Any, path: str) -> "Fields":
        if not isinstance(value, Mapping):
            raise RequestError(f"{path}: must be an object", path, "invalid_type")
        return Fields(value, path, is_dotted=self._is_dotted)

    def _check_range(self, name: str, value: float, least: float, most: float | None, kind: str) -> None:
        if value < least:
            raise self.refuse(
                name, f"must be at least {least}, found {_shown(value)}", f"{kind}_below_min_value"
            )
        if most is not None and value > most:
            raise self.refuse(
                name, f"must be at most {most}, found {_shown(value)}", f"{kind}_above_max_value"
            )


def _shown(value: float) -> str:
    """A number in a message: Python refuses to print integers of thousands of digits."""
    return str(value) if abs(value) < 10**20 else "a huge number"
