"""Text on both sides of the model: tokenizer, chat template, output parser, grammars. Pure: no MLX."""
