"""Request bodies for the OpenAPI document: what is served, as far as JSON Schema can say it."""

from collections.abc import Mapping
from typing import Any

SCHEMAS: Mapping[str, Mapping[str, Any]] = {}
