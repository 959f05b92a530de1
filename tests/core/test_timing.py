"""When a method acts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt._core.timing import LAST, Every, nonnegative_at, value_at


def _due(when: Every, steps: int = 12) -> list[int]:
    return [step for step in range(steps) if when.is_due(jnp.array(step))]


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        (None, None, list(range(12))),
        (0, 1, list(range(12))),
        (3, None, list(range(3, 12))),
        (None, 4, [0, 4, 8]),
        (2, 4, [2, 6, 10]),
        (9, 4, [9]),
        (12, 1, []),
    ],
)
def test_before_an_update(start: int | None, every: int | None, expected: list[int]):
    when = Every.before_update(start, every)
    assert _due(when) == expected
    assert when.always == (expected == list(range(12)))


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        (None, None, list(range(1, 12))),
        (0, None, list(range(1, 12))),
        (1, 1, list(range(1, 12))),
        (None, 4, [4, 8]),
        (0, 4, [4, 8]),
        (2, 4, [2, 6, 10]),
        (9, 4, [9]),
        (8, 4, [8]),
    ],
)
def test_after_an_update(start: int | None, every: int | None, expected: list[int]):
    """None and 0 are the end of the first period; the first period began `every` before `start`."""
    when = Every.after_update(start, every)
    assert _due(when) == expected
    assert when.begin == expected[0] - (every or 1)
    assert [int(when.turns_before(jnp.array(s))) for s in expected] == list(range(len(expected)))


@pytest.mark.parametrize(("start", "every"), [(None, None), (None, 4), (2, 3)])
def test_the_latest_act(start: int | None, every: int | None):
    when = Every.before_update(start, every)
    due = _due(when)
    for step in range(due[0], 12):
        assert int(when.latest(jnp.array(step))) == max(s for s in due if s <= step)


def test_the_latest_act_beyond_the_counter():
    for step in (0, 1, LAST):
        assert int(Every.before_update(0, 2**40).latest(jnp.array(step))) == 0


@pytest.mark.parametrize("make", [Every.before_update, Every.after_update])
def test_beyond_the_counter_is_never(make):
    steps = jnp.array([0, 1, 1000, LAST - 1, LAST])
    assert not any(make(LAST + 1, None).is_due(s) for s in steps)
    assert not any(make(2**40, 3).is_due(s) for s in steps)
    assert [bool(make(1, 2**40).is_due(s)) for s in steps] == [False, True, False, False, False]


def test_a_counter_that_has_stopped_tells_nothing_about_the_period():
    last = jnp.array(LAST)
    assert Every.before_update(5, 1).is_due(last)  # Each update is still one.
    assert not any(Every.before_update(LAST % n, n).is_due(last) for n in (2, 3, 7))


@pytest.mark.parametrize("make", [Every.before_update, Every.after_update])
@pytest.mark.parametrize(("start", "every"), [(None, None), (2, None), (0, 3), (4, 2)])
def test_run_does_what_is_due_and_else_nothing(make, start, every):
    when = make(start, every)
    run = jax.jit(lambda step, x: when.run(step, lambda x: x + 1, x))
    found = [int(run(jnp.array(s), jnp.array(0))) for s in range(12)]
    expected = [int(when.always or bool(when.is_due(jnp.array(s)))) for s in range(12)]
    assert found == expected


@pytest.mark.parametrize("make", [Every.before_update, Every.after_update])
def test_what_is_no_count_is_refused(make):
    for bad in ({"start": -1}, {"every": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            make(**{"start": None, "every": None, **bad})
    for bad in ({"start": 1.0}, {"every": True}, {"every": jnp.array(2)}):
        with pytest.raises(TypeError, match=f"{next(iter(bad))}="):
            make(**{"start": None, "every": None, **bad})


def test_numbers_and_schedules():
    assert value_at(0.5, jnp.array(3)) == 0.5
    np.testing.assert_allclose(value_at(lambda t: 2.0 - t, jnp.array(3)), -1.0)
    np.testing.assert_allclose(nonnegative_at(lambda t: 2.0 - t, jnp.array(3)), 0.0)
    assert nonnegative_at(-0.1, jnp.array(3)) == -0.1  # Numbers were checked when they came.
