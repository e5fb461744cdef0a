"""What an error says in one line, and which error a user sees of those that cross processes."""

from __future__ import annotations

import pytest
import ray

from bss_ray.data import lance
from bss_ray.errors import DataError, StorageError, first_line
from bss_ray.runtime.wait import unwrap_ray_error, users_errors


@pytest.mark.parametrize(
    ("message", "line"),
    [("", "OSError"), (" \n ", "OSError"), ("\nfull.\nsecond line", "full"), ("one line", "one line")],
)
def test_first_line(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line


def test_an_empty_message_of_a_library_is_no_error_of_its_own() -> None:
    with pytest.raises(StorageError, match=r"cannot read it: RuntimeError\. Check"), lance._storage("read it"):
        raise RuntimeError


def of_a_task(cause: Exception) -> ray.exceptions.RayTaskError:
    """As Ray hands it to whoever asks for the result."""
    return ray.exceptions.RayTaskError("task", "traceback", cause).as_instanceof_cause()


class TestErrorsOfTasks:
    def test_one_of_the_user_is_raised_as_it_was(self) -> None:
        twice = of_a_task(of_a_task(DataError("rule: 3 rows\nFailed to apply UDF. Ray's advice")))
        with pytest.raises(DataError) as caught, users_errors():
            raise twice
        assert type(caught.value) is DataError
        assert str(caught.value) == "rule: 3 rows"

    def test_any_other_keeps_the_traceback_of_its_process(self) -> None:
        with pytest.raises(ray.exceptions.RayTaskError, match="traceback"), users_errors():
            raise of_a_task(ValueError("a bug"))

    def test_the_cause_alone(self) -> None:
        cause, other = ValueError("a bug"), ray.exceptions.RayActorError()
        assert unwrap_ray_error(of_a_task(cause)) is cause
        assert unwrap_ray_error(other) is other
