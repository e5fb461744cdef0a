"""The example of a search space is a space."""

import yaml

from bss_ray.train.settings import training_config
from bss_ray.tune.space import find_space


def test_the_example_can_be_searched() -> None:
    space = find_space("examples.search_space:space", yaml.safe_load(training_config({})[1]))
    space.try_out()
    assert space.known_good[0]["lr"] == 2e-3
