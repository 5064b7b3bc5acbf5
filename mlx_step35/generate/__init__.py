"""Text generation as a Python API and as the command `mlx_step35.generate`.

The API has mlx-lm's names, parameters and response fields, so that a script for mlx-lm runs with its import
changed. What mlx-lm offers and this model has no use for is refused with the reason.
"""

from mlx_step35.generate.api import GenerationResponse as GenerationResponse
from mlx_step35.generate.api import generate as generate
from mlx_step35.generate.api import load as load
from mlx_step35.generate.api import stream_generate as stream_generate


def main() -> None:
    """The command; ends the process."""
    import sys

    from mlx_step35.generate.cli import run

    sys.exit(run(sys.argv[1:]))
