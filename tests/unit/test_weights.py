"""Weights that do and do not fit a model, and the number of classes that they tell."""

import re

import pytest
import torch
from torch import nn

from bss_ray.errors import CheckpointError, ConfigError
from bss_ray.models import LateFusion
from bss_ray.models.weights import classes_of_weights, load_weights, strip_prefixes

SHAPES = {"a": (6,), "b": (1, 8, 8)}


def make_model(num_classes: int = 4, width: int = 8, seed: int = 0) -> LateFusion:
    torch.manual_seed(seed)
    return LateFusion(SHAPES, num_classes, width=width)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_that_fit_are_loaded_also_from_wrapped_models(prefix: str) -> None:
    source, target = make_model(seed=1), make_model(seed=2)
    assert not same(source, target)
    load_weights(target, {prefix + name: value for name, value in source.state_dict().items()}, "w.pt")
    assert same(source, target)


def test_a_prefix_that_only_some_names_have_stays() -> None:
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_prefixes(state) == state


def test_all_three_kinds_of_misfit_are_named_and_the_model_stays() -> None:
    target, before = make_model(seed=2), make_model(seed=2)
    state = dict(make_model(seed=1).state_dict())
    del state["heads.a.weight"]
    state["heads.c.weight"] = torch.zeros(4, 8)
    state["fused.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, state, "some/w.pt")
    for said in (
        "weights of some/w.pt do not fit the model LateFusion",
        "1 missing: heads.a.weight",
        "1 unexpected: heads.c.weight",
        "1 of other shapes: fused.bias (4,) against (7,)",
        "--num_classes",
    ):
        assert said in str(caught.value)
    assert same(target, before)


def test_many_names_are_counted_and_few_shown() -> None:
    with pytest.raises(CheckpointError, match=r"missing: .*\.\.\.") as caught:
        load_weights(make_model(), {}, "w.pt")
    total = len(make_model().state_dict())
    assert f"{total} missing" in str(caught.value)
    assert len(re.findall("encoders|heads|fused", str(caught.value))) == 5


@pytest.mark.parametrize("classes", [1, 2, 4, 37])
def test_the_heads_tell_the_number_of_classes(classes: int) -> None:
    state = make_model(classes).state_dict()
    assert classes_of_weights(lambda n: LateFusion(SHAPES, n, width=8), state, "w.pt") == classes


def test_weights_that_do_not_tell_the_number_of_classes() -> None:
    state = {name: value for name, value in make_model().state_dict().items() if "encoders" in name}
    with pytest.raises(CheckpointError, match=r"say nothing of it\. Name it: --num_classes N"):
        classes_of_weights(lambda n: LateFusion(SHAPES, n, width=8), state, "w.pt")
    state = {"heads.a.bias": torch.zeros(4), "heads.b.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"say \[4, 5\]"):
        classes_of_weights(lambda n: LateFusion(SHAPES, n, width=8), state, "w.pt")


def test_a_constructor_that_looks_at_its_weights_is_built_with_memory() -> None:
    class Picky(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2 * classes + 1)
            assert float(self.head.weight.detach().sum()) != 1e9  # impossible without memory

    assert classes_of_weights(Picky, Picky(11).state_dict(), "w.pt") == 11


def test_settings_that_no_model_takes_are_not_hidden() -> None:
    def build(_classes: int) -> nn.Module:
        raise ConfigError("no such argument")

    with pytest.raises(ConfigError, match="no such argument"):
        classes_of_weights(build, {}, "w.pt")
