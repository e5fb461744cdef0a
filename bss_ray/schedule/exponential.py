"""exp with the same bits on every CPU."""

from __future__ import annotations

import math

import numpy as np

# ln 2 in two parts: the first has 21 trailing zero bits, so that k * _LN2_HIGH is exact for |k| < 2^20.
_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10
# Taylor on |r| <= ln(2) / 2: the next term is below 2^-57 of the result.
_COEFFICIENTS = [1.0 / math.factorial(power) for power in range(13, -1, -1)]


def stable_exp(x: np.ndarray) -> np.ndarray:
    """exp(x) to about 1e-16, by operations that IEEE 754 defines to the last bit.

    `np.exp` has other code for AVX-512 than for older CPUs, and their last bits differ; the weights of
    rows, and so their order, must not depend on which node of a cluster worked them out.

    Args:
        x: (n,) float64, within [-700, 700].

    Returns:
        (n,) float64.
    """
    k = np.rint(x / math.log(2))
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    result = np.full_like(x, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:  # in place: twice as fast as fresh arrays
        result *= r
        result += coefficient
    # times 2^k, by its exponent bits: the result is a normal number, and np.ldexp would take as long as all the rest
    result.view(np.int64)[...] += k.astype(np.int64) << 52
    return result
