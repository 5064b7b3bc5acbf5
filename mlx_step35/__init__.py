"""Step-3.5-Flash on Apple Silicon: exact local inference with MLX and all three multi-token-prediction heads."""

from mlx_step35.generate import GenerationResponse as GenerationResponse
from mlx_step35.generate import generate as generate
from mlx_step35.generate import load as load
from mlx_step35.generate import stream_generate as stream_generate
