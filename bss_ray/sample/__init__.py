"""The sampler: one exact global order per epoch, drawn from scores that are spread over holders."""

from bss_ray.sample.permutation import weighted_permutation

__all__ = ["weighted_permutation"]
