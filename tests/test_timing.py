"""Choosing threads, and doubting what was measured; nothing here depends on how fast the machine is."""

import pytest
import torch

from foldbit import timing
from foldbit.timing import Timing


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("many", "taken"), [(5.0, 1), (1.05, 2), (0.6, 2)])
def test_one_thread_where_two_are_slower(monkeypatch, many, taken):
    times = {"many": Timing(many, many, many), "one": Timing(1.0, 1.0, 1.0)}
    monkeypatch.setattr(timing, "interleaved", lambda *_, **__: times)
    assert timing.sensible_threads(lambda: None) == taken
    assert torch.get_num_threads() == 2


def test_both_numbers_are_tried_and_all_is_put_back(monkeypatch):
    seen = set()
    timing.sensible_threads(lambda: seen.add(torch.get_num_threads()))
    assert seen == {1, 2} and torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        timing.sensible_threads(lambda: 1 / (torch.get_num_threads() - 1))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("asked", "sensible", "taken", "said"),
    [
        (3, None, 3, "  on 3 threads: as asked"),
        (None, 1, 1, "  on 1 thread: 2 are slower just now, by other work perhaps"),
        (None, 2, 2, "  on 2 threads: all there are"),
    ],
)
def test_what_is_taken_is_said_and_put_back(monkeypatch, asked, sensible, taken, said):
    monkeypatch.setattr(timing, "sensible_threads", lambda step: sensible)
    lines = []
    with pytest.raises(KeyError), timing.threads(asked, lambda: None, lines.append) as count:
        assert count == taken == torch.get_num_threads()
        raise KeyError
    assert lines == [said] and torch.get_num_threads() == 2


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="at least 1; got 0"), timing.threads(0, lambda: None):
        pass


def test_unsteady_times_are_warned_of():
    steady, wide = Timing(1.0, 0.9, 1.1), Timing(1.0, 0.01, 2.78)
    assert timing.warning({"a": steady}) == ""
    said = timing.warning({"a": steady, "b": wide})
    assert said.startswith("DO NOT TRUST") and "of b are up to 277% of the median apart" in said


def test_rounds_are_at_least_as_many_as_asked_for():
    calls = []
    timing.interleaved({"a": lambda: calls.append(1)}, seconds=0, rounds=3)
    assert len(calls) >= 3
