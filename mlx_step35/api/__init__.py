"""Three dialects in JSON, and our own types: pure functions, no MLX, no HTTP."""
