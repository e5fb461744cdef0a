"""From balance scores to sampling weights: pacing functions and schedulers."""

from bss_ray.schedule.schedulers import Heuristic, Learning, Scheduler, Uniform, pacing

__all__ = ["Heuristic", "Learning", "Scheduler", "Uniform", "pacing"]
