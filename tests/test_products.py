"""Attention from plain products against MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.cache import window_mask
from mlx_step35.products import CAUSAL_BLOCK, attend


@pytest.mark.parametrize(
    ("num_tokens", "past", "window"),
    [(17, 0, None), (40, 5, None), (CAUSAL_BLOCK, 3, None), (2 * CAUSAL_BLOCK + 7, 9, None), (60, 30, 16)],
)
def test_equals_the_fused_call(num_tokens: int, past: int, window: int | None) -> None:
    mx.random.seed(num_tokens)
    queries = mx.random.normal((2, 6, num_tokens, 16))
    keys, values = (mx.random.normal((2, 2, past + num_tokens, 16)) for _ in range(2))
    mask = window_mask(num_tokens, past, window)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mask)
    np.testing.assert_allclose(attend(queries, keys, values, 0.3, mask), expected, atol=1e-6)


def test_no_mask_sees_everything() -> None:
    queries, keys = mx.random.normal((1, 4, 20, 8)), mx.random.normal((1, 4, 30, 8))
    expected = mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0)
    np.testing.assert_allclose(attend(queries, keys, keys, 1.0, None), expected, atol=1e-6)
