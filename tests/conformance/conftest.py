"""Here every step is judged twice, by the kernels and by torch, which must agree to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.judged_twice import judging_twice


@pytest.fixture(scope="package", autouse=True)
def _judged_twice() -> Iterator[None]:
    with judging_twice():
        yield
