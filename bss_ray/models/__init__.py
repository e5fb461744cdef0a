"""Encoders and late fusion for the recipes."""

from bss_ray.models.late_fusion import LateFusion

__all__ = ["LateFusion"]
