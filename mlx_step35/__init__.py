"""Step-3.5-Flash on Apple Silicon: exact local inference with MLX and all three multi-token-prediction heads."""
