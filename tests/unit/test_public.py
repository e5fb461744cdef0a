"""The public surface is what the README shows."""

import subprocess
import sys

import bss_ray


def test_names() -> None:
    assert set(bss_ray.__all__) == {
        "BalancedTrainer",
        "BssRayError",
        "Columns",
        "Heuristic",
        "Learning",
        "Measurer",
        "Measures",
        "RowRandom",
        "Scoring",
        "StoreConfig",
        "Uniform",
        "balance_scores",
        "get_sampler",
        "register_information",
        "register_similarity",
        "score_dataset",
        "weighted_permutation",
    }
    for name in bss_ray.__all__:
        assert getattr(bss_ray, name).__doc__


def test_sampler_without_ray() -> None:
    # A plain PyTorch script must not pay for Ray.
    code = "import bss_ray, sys; bss_ray.weighted_permutation([1.0], seed=0); sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_holders_without_torch() -> None:
    # A second of start and 120 MB for each of many processes.
    code = "import bss_ray.sample.actors, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
