"""Weights from a file: do they fit the model, and for how many classes were they trained?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bss_ray.errors import CheckpointError, ConfigError

# Most names of each kind that a message shows.
_NAMED = 5

# Prefixes of the names of tensors in wrappers: DistributedDataParallel, `torch.compile`.
_PREFIXES = ("module.", "_orig_mod.")

# Of a tensor; of another value the name of its class.
_Shape = tuple[int, ...] | str

# Heads are built for these two numbers of classes; what changes between them shows how shapes depend on the number.
_PROBES = (3, 5)


def load_weights(model: nn.Module, state: Mapping[str, object], source: str) -> None:
    """Load exactly the weights of a state dict into a model.

    Prefixes that DistributedDataParallel and `torch.compile` put before all names are removed.

    Args:
        model: Model that gets the weights; it is changed only if they fit.
        state: A state dict.
        source: Origin of the state dict, for the message.

    Raises:
        CheckpointError: Weights are missing, unexpected, or of another shape; the error names them.
    """
    state = strip_prefixes(state)
    own = model.state_dict()
    problems = [
        *_named("missing", sorted(own.keys() - state.keys())),
        *_named("unexpected", sorted(state.keys() - own.keys())),
        *_named("of other shapes", _other_shapes(own, state)),
    ]
    if problems:
        raise CheckpointError(
            f"the weights of {source} do not fit the model {type(model).__name__}: {'; '.join(problems)}. Build the "
            "model with the arguments it was trained with (--model.class_path, --model.NAME, --num_classes), or name "
            "another checkpoint"
        )
    model.load_state_dict(dict(state))


def strip_prefixes(state: Mapping[str, object]) -> Mapping[str, object]:
    """A state dict without the prefixes that wrappers put before all names."""
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return strip_prefixes({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def _other_shapes(own: Mapping[str, object], state: Mapping[str, object]) -> list[str]:
    """Tensors whose shapes differ: `name (here) against (there)`."""
    shapes = {name: (_shape(own[name]), _shape(state[name])) for name in own if name in state}
    return [f"{name} {here} against {there}" for name, (here, there) in shapes.items() if here != there]


def _shape(value: object) -> _Shape:
    """Shape of a tensor; other values of a state dict have no shape."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _named(kind: str, names: list[str]) -> list[str]:
    """`["3 missing: a, b, c"]`, or an empty list."""
    if not names:
        return []
    more = ", ..." if len(names) > _NAMED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{more}"]


def classes_of_weights(build: Callable[[int], nn.Module], state: Mapping[str, object], source: str) -> int:
    """Number of classes for which weights were trained, from the shapes of the heads.

    The model is built for two numbers of classes, without memory for its weights. A dimension that differs between
    the two models depends on the number as `a * classes + b`, so the dimension of the weights gives the number. All
    such dimensions must agree.

    Args:
        build: Function that makes the model for a number of classes.
        state: A state dict.
        source: Origin of the state dict, for the message.

    Raises:
        CheckpointError: The weights do not tell the number, or contradict themselves.
    """
    state = strip_prefixes(state)
    few, many = (_shapes(build, classes) for classes in _PROBES)
    found = {
        classes
        for name in few.keys() & many.keys() & state.keys()
        for classes in _solve(few[name], many[name], _shape(state[name]))
    }
    if len(found) != 1:
        said = "say nothing of it" if not found else f"say {sorted(found)}"
        raise CheckpointError(
            f"cannot tell for how many classes the weights of {source} were trained: the shapes of the heads {said}. "
            "Name it: --num_classes N"
        )
    return found.pop()


def _shapes(build: Callable[[int], nn.Module], classes: int) -> dict[str, _Shape]:
    """Shapes of the model's tensors for a number of classes."""
    try:
        with torch.device("meta"):  # no memory, no random numbers
            model = build(classes)
    except ConfigError:
        raise
    except Exception:  # a constructor that looks at its weights
        model = build(classes)
    return {name: _shape(value) for name, value in model.state_dict().items()}


def _solve(few: _Shape, many: _Shape, there: _Shape) -> Iterable[int]:
    """Numbers of classes that make a tensor of shape `there`, one for each dimension that depends on it."""
    if isinstance(few, str) or isinstance(many, str) or isinstance(there, str):
        return
    if not len(few) == len(many) == len(there):
        return
    low, high = _PROBES
    for at_low, at_high, size in zip(few, many, there, strict=True):
        slope, rest = divmod(at_high - at_low, high - low)
        offset = at_low - slope * low
        if slope > 0 and rest == 0 and (size - offset) % slope == 0:
            yield (size - offset) // slope
