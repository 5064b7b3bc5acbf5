"""What the package imports unasked is what installing it without extras brings."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imported() -> Iterator[tuple[str, str]]:
    """Module and file of every import, wherever in the file it is."""
    for path in sorted((ROOT / "mlx_step35").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            yield from ((name.split(".")[0], str(path.relative_to(ROOT))) for name in names)


def test_every_import_is_a_base_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[^\w-]", entry)[0].replace("-", "_") for entry in project["dependencies"]}
    known = base | set(sys.stdlib_module_names) | {"mlx_step35"}
    # Plots are an extra, asked for by name.
    optional = {("matplotlib", "mlx_step35/bench/plot.py")}
    foreign = {entry for entry in imported() if entry[0] not in known} - optional
    assert not foreign, f"not among pyproject's dependencies: {sorted(foreign)}"
