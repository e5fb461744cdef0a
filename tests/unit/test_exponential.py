"""exp, and with it every order, has the same bits whatever SIMD instructions the CPU has."""

import os
import subprocess
import sys

import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from bss_ray.schedule.schedulers import stable_exp

DIGEST = """
import hashlib, numpy as np
from bss_ray import Learning
from bss_ray import weighted_permutation
score = np.random.default_rng(0).uniform(-1, 1, 100_000)
weights = Learning(temperature=0.07).weights(score)
order = weighted_permutation(weights, seed=5, epoch=2)
print(hashlib.sha256(weights.tobytes() + order.tobytes()).hexdigest())
"""


def test_close_to_exp() -> None:
    x = np.concatenate([np.random.default_rng(0).uniform(-200, 200, 100_000), np.linspace(-1e-9, 1e-9, 101), [0.0]])
    np.testing.assert_allclose(stable_exp(x), np.exp(x), rtol=1e-15)
    assert stable_exp(np.zeros(1))[0] == 1.0


def test_never_falls() -> None:
    # A higher score must not lower a weight, also across the edges of the range reduction.
    x = np.sort(np.random.default_rng(1).uniform(-5, 5, 200_000))
    assert (np.diff(stable_exp(x)) >= 0).all()


def test_same_order_without_simd() -> None:
    features = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    digests = []
    for disabled in ("", " ".join(features)):
        environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled}
        if not disabled:
            del environment["NPY_DISABLE_CPU_FEATURES"]
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        assert "warn" not in done.stderr.lower(), done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1]
