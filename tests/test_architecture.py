"""The import table of docs/architecture.md, held by reading every module's imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_step35"

# A module may import only from groups before its own; siblings inside one package may import each other.
GROUPS = [
    {"errors"},
    {"exits"},
    {"config"},
    {"quantization"},
    {"layout"},
    {"costs"},
    {"memory"},
    {"recipes", "speed"},
    {"timing"},
    {"depth", "lookup"},
    {"cache", "sampling", "chat"},
    {"products"},
    {"attention", "moe"},
    {"model"},
    {"mtp"},
    {"mtp_state"},
    {"checkpoint"},
    {"guard"},
    {"conversion", "decoding"},
    {"prompt_cache"},
    {"engine"},
    {"api"},
    {"http"},
    {"conversion"},
    {"generate", "convert", "quality", "server", "plan", "bench"},
]
COMMAND_LINES = GROUPS[-1]
WITHOUT_MLX = {
    "config",
    "quantization",
    "layout",
    "costs",
    "memory",
    "recipes",
    "speed",
    "timing",
    "depth",
    "lookup",
    "chat",
    "api",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit(path: Path) -> str:
    """The package or module directly under mlx_step35 that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rank(name: str) -> int:
    ranks = [index for index, group in enumerate(GROUPS) if name in group]
    assert ranks, f"{name} has no place in the import table"
    return ranks[0]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, wherever in the file it does so."""
    package = ["mlx_step35", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = unit(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "mlx_step35" or parts[1] == own:
            continue
        if parts[1][0].isupper() or parts[1].startswith("_"):
            pytest.fail(f"{path.name} imports {name} from the package's top level; import it from its module")
        assert rank(parts[1]) < rank(own) or (own in COMMAND_LINES and parts[1] in COMMAND_LINES), (
            f"{own} imports {name}"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_modules_never_import_mlx(path: Path) -> None:
    if unit(path) in WITHOUT_MLX:
        found = [name for name in imports(path) if name.split(".")[0] in {"mlx", "mlx_lm"}]
        assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_evaluation_stays_where_it_belongs() -> None:
    """mx.eval and friends block the host: only the decode loop, disk and measuring code may call them."""
    allowed = {"decoding", "checkpoint", "prompt_cache", "bench", "quality", "convert", "conversion"}
    for path in MODULES:
        if unit(path) in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                evaluates = node.func.attr in {"eval", "async_eval", "clear_cache"}
                module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                assert not (evaluates and module == "mx"), (
                    f"{path.name}:{node.lineno} calls mx.{node.func.attr}"
                )
                assert node.func.attr != "item", f"{path.name}:{node.lineno} calls .item()"


def test_no_drawer_for_everything() -> None:
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "common", "base", "registry"}]
