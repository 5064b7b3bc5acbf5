"""`python -m mlx_step35.plan`."""

from mlx_step35.plan import main

main()
