"""The default model: encoders and late fusion."""

from bss_ray.models.late_fusion import LateFusion

__all__ = ["LateFusion"]
