"""Step-3.5-Flash on Apple Silicon: exact local inference with MLX and all three MTP heads."""

import warnings

# `generate` and `convert` are functions here and commands too (`python -m mlx_step35.convert`), so their
# modules are loaded before runpy runs them; its warning about that means nothing here. The filter has to be
# set before the modules are loaded, so the imports come behind it.
warnings.filterwarnings("ignore", r"'mlx_step35\.\w+' found in sys\.modules", RuntimeWarning)

from mlx_step35.convert import convert as convert  # noqa: E402
from mlx_step35.generate import GenerationResponse as GenerationResponse  # noqa: E402
from mlx_step35.generate import generate as generate  # noqa: E402
from mlx_step35.generate import load as load  # noqa: E402
from mlx_step35.generate import stream_generate as stream_generate  # noqa: E402

__all__ = ["GenerationResponse", "convert", "generate", "load", "stream_generate"]
