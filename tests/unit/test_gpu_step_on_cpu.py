"""The GPU tests' own code, run on the CPU: what cannot run without a device would otherwise rot unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import pytest

from tests.gpu import test_gpu_step as gpu_tests
from tests.gpu import test_gpu_tags


@contextmanager
def never_waiting() -> Iterator[None]:
    """Stand for the guard of the device, which the CPU does not have."""
    yield


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "GPU", gpu_tests.CPU)
    monkeypatch.setattr(gpu_tests, "waiting_for_the_device_is_an_error", never_waiting)


NEED_THE_GUARD = {
    "test_the_guard_catches_a_synchronisation",
    "test_what_learns_and_remembers_makes_it_wait_at_its_interval_only",
}
CASES = [
    pytest.param(test, id=name)
    for name, test in (vars(gpu_tests) | vars(test_gpu_tags)).items()
    if name.startswith("test_") and name not in NEED_THE_GUARD
]


@pytest.mark.parametrize("test", CASES)
def test_it_passes_on_the_cpu(test) -> None:
    choices = {
        "precision": ["fp32", "bf16"],
        "make": [gpu_tests.plain, gpu_tests.everything],
        "objective": [*gpu_tests.OBJECTIVES],
    }
    names = [*signature(test).parameters]
    for number in range(max(len(choices[name]) for name in names) if names else 1):
        test(**{name: choices[name][number % len(choices[name])] for name in names})
