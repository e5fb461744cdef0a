"""What a process imports decides how soon it starts: torch takes a second, Ray Data another."""

import subprocess
import sys

import pytest

# Of processes that run next to the ranks, and of the parts of commands that every process shares.
WITHOUT_TORCH = (
    "bss_ray",
    "bss_ray.data.build",
    "bss_ray.data.tasks",
    "bss_ray.sample.holder",
    "bss_ray.sample.actors",
    "bss_ray.sample.service",
    "bss_ray.scoring.config",
    "bss_ray.schedule",
    "bss_ray.storage.probe",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_is_not_imported(module: str) -> None:
    check = f"import {module}, sys; sys.exit(f'{{len(sys.modules)}} modules' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
