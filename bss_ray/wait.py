"""Waits for other processes: each has a limit, and says what it waited for when it is over.

A node can be cut off without a word, and what Ray waits for then is in the hands of its own health checks. The limit
is the last resort: it turns a run that would hang for ever into an error, and the ranks start again from their last
checkpoint.
"""

from __future__ import annotations

from typing import Any

import ray

# Longer than any single step between processes should take; as long as torch.distributed waits for a collective.
DEFAULT_LIMIT_S = 1800.0

_limit_s = DEFAULT_LIMIT_S


class WaitError(TimeoutError):
    """Another process did not answer within the limit.

    No error of the user's: the ranks start again from the last checkpoint, as often as `max_failures` allows.
    """


def set_wait_limit(seconds: float) -> None:
    """How long this process waits for others. Each process of a run sets it once, when it starts to work."""
    global _limit_s
    _limit_s = seconds


def wait_limit() -> float:
    """Seconds that this process waits for others."""
    return _limit_s


def wait_for(reference: Any, what: str) -> Any:
    """The value of a reference, or of a list of them.

    Args:
        reference: as of `ray.get`.
        what: is waited for, to go on the text "waited 1800 s for".

    Raises:
        WaitError: it did not come within the limit.
    """
    try:
        return ray.get(reference, timeout=_limit_s)
    except ray.exceptions.GetTimeoutError:
        raise waited_for(what) from None


def waited_for(what: str) -> WaitError:
    """The error of a wait that is over."""
    return WaitError(
        f"waited {_limit_s:g} s for {what}. Its process or its node may be cut off or stuck: see `ray list actors` and "
        "`ray list nodes`; if it is only slow, raise wait_limit_s"
    )
