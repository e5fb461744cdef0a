"""From balance scores to sampling weights: pacing functions and schedulers."""

from bss_ray.schedule.pacing import pacing
from bss_ray.schedule.schedulers import Heuristic, Learning, Scheduler, Uniform

__all__ = ["Heuristic", "Learning", "Scheduler", "Uniform", "pacing"]
