"""`python -m mlx_step35.bench`."""

from mlx_step35.bench import main

main()
