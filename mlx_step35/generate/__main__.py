"""`python -m mlx_step35.generate`."""

from mlx_step35.generate import main

main()
