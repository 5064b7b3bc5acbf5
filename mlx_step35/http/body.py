"""A request's body as JSON, within limits. Frameworks' own models know no limit and answer 422."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from mlx_step35.api.failures import Failure, FailureError
from mlx_step35.errors import RequestError

MAX_DEPTH = 200
# Programs on the same machine send at once; who takes longer has stopped.
MAX_SENDING_S = 120


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises FailureError for one that is too large (413) or does not come to an end (408).

    What is too large is still read for a while, thrown away: a client that is cut off in the middle of
    sending does not see the answer.
    """
    announced = request.headers.get("content-length", "")
    is_too_large = announced.isdecimal() and int(announced) > max_bytes
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(MAX_SENDING_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                is_too_large = is_too_large or num_bytes > max_bytes
                if is_too_large:
                    chunks.clear()
                    if num_bytes > 2 * max_bytes:
                        break
                else:
                    chunks.append(chunk)
    except TimeoutError:
        raise FailureError(Failure(408, f"the body did not come within {MAX_SENDING_S} s")) from None
    except ClientDisconnect:
        raise FailureError(Failure(400, "the client left while sending")) from None
    if is_too_large:
        raise FailureError(Failure(413, f"the body is larger than {max_bytes} bytes"))
    return b"".join(chunks)


def parse_json(body: bytes) -> Mapping[str, Any]:
    """The body's JSON object. Raises RequestError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    _check_depth(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    """Raises RequestError for a value that code which recurses could not handle."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [child for child in one.values() if isinstance(child, dict | list)]
            elif isinstance(one, list):
                below += [child for child in one if isinstance(child, dict | list)]
        level = below
