"""Normalisation: however rows are split and in whatever order the parts come, not one bit changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bss_ray.measure import normalise
from bss_ray.measure.normalise import NORMALISATIONS

# Zeros of both signs, subnormal and huge values; few of them, so that there are ties.
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, float("nan")])
columns = st.one_of(
    st.lists(st.sampled_from([0.0, -0.0, 1.0]), max_size=4),
    st.lists(special, max_size=8),
    st.lists(st.floats(width=32, allow_infinity=False), max_size=30),
)


@given(values=columns, kind=st.sampled_from(sorted(NORMALISATIONS)), data=st.data())
def test_any_split_in_any_order(values: list[float], kind: str, data: st.DataObject) -> None:
    column, norm = np.array(values, np.float32), NORMALISATIONS[kind]
    owner = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))), int)
    parts = [norm.of(column[owner == index]) for index in data.draw(st.permutations(range(4)))]
    whole = norm.of(column).apply(column)
    joined = norm.union([norm.union(parts[:2]), norm.union(parts[2:])])  # type: ignore[arg-type]
    assert joined.apply(column).view(np.uint64).tolist() == whole.view(np.uint64).tolist()


@given(values=columns, kind=st.sampled_from(sorted(NORMALISATIONS)), many=st.booleans())
def test_order_and_range(values: list[float], kind: str, many: bool) -> None:
    column = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if many:
            patch.setattr(normalise, "_MANY", 1)
        found = NORMALISATIONS[kind].of(column).apply(column)
    assert (np.isnan(found) == np.isnan(column)).all()
    known, measured = found[~np.isnan(found)], column[~np.isnan(column)]
    assert ((known >= 0) & (known <= 1)).all()
    order = np.argsort(measured, kind="stable")
    assert (np.diff(known[order]) >= 0).all()
    if len(measured) and measured.min() == measured.max():
        assert (known == 0).all()
