"""What the package offers, and that functions and commands of one name do not get in each other's way."""

import subprocess
import sys

import pytest

import mlx_step35

COMMANDS = ["generate", "convert", "quality", "plan", "server", "bench"]


def test_public_names() -> None:
    assert mlx_step35.__all__ == ["GenerationResponse", "convert", "generate", "load", "stream_generate"]
    assert all(hasattr(mlx_step35, name) for name in mlx_step35.__all__)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_all_that_help_prints(name: str) -> None:
    command = [sys.executable, "-m", f"mlx_step35.{name}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith(f"usage: mlx_step35.{name}")


def test_functions_stay_callable_after_their_modules_are_imported() -> None:
    code = (
        "import mlx_step35, mlx_step35.generate, mlx_step35.convert;"
        "assert callable(mlx_step35.generate) and callable(mlx_step35.convert);"
        "import mlx_step35.generate.cli; assert callable(mlx_step35.generate)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
