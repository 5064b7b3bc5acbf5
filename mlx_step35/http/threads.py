"""Work that takes a while goes to a thread of its own, so that the loop serves everybody else."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result or its exception, whatever that is."""

    def run() -> T:
        try:
            return function(*args, **kwargs)
        except StopIteration as error:
            # No future can carry it: whoever awaits the answer would wait for ever.
            raise RuntimeError("an iteration ended where nothing expected it") from error

    return await asyncio.to_thread(run)
