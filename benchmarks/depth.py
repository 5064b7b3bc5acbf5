"""The depth controller against simulated machines and texts: what it loses against the best it could do.

    python -m benchmarks.depth [--seeds 4]

The worlds are those of tests/test_depth.py, whose true costs are known; nothing here is timed. For each kind
of noise it prints the worst over all worlds and seeds: cost over that of no drafts once settled, speed over
that of the best fixed depth once settled, and the same speed for a new controller's first 600 tokens.
"""

import argparse

from mlx_step35.depth import DepthController
from tests.test_depth import WORLDS, unit_bytes
from tests.worlds import LARGE, NOISES, World

SETTLED = 400  # tokens
START = 600  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4, help="runs of each world (default: %(default)s)")
    num_seeds = parser.parse_args().seeds
    if num_seeds < 1:
        parser.error(f"--seeds must be at least 1, found {num_seeds}")
    for noise in NOISES:
        runs = [measure(name, noise, seed) for name in WORLDS for seed in range(num_seeds)]
        over, speed, start = zip(*runs, strict=True)
        print(
            f"{noise:13} over off {max(over):.3f}  speed {min(speed):.3f}  start {min(start):.3f}", flush=True
        )


def measure(name: str, noise: str, seed: int) -> tuple[float, float, float]:
    """Cost over no drafts and speed over the best depth once settled, and that speed at the start."""
    world = World(**WORLDS[name], noise=NOISES[noise], seed=seed)
    cost, _ = world.auto(controller(seed), SETTLED)
    off, best = world.off(SETTLED), world.best(SETTLED)
    early = World(**WORLDS[name], noise=NOISES[noise], seed=seed, num_tokens=START)
    early_cost, _ = early.auto(controller(seed), 0)
    return cost / off, best / cost, early.best() / early_cost


def controller(seed: int) -> DepthController:
    """A new one; with odd seeds its first estimates are far off, as in the tests."""
    return DepthController(unit_bytes if seed % 2 else LARGE)


if __name__ == "__main__":
    main()
