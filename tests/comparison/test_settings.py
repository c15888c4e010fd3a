"""What a comparison refuses to be asked."""

import pytest

from lightning_bsr import ConfigurationError
from lightning_bsr.comparison._settings import numbers, words
from lightning_bsr.methods import METHODS


@pytest.mark.parametrize("given", ["full,head", " full , head ", "[full, head]", ["full", "head"]])
def test_words__all_ways_to_write_a_list(given):
    assert words(given) == ("full", "head")


@pytest.mark.parametrize("given", ["5e-4,1", [5e-4, 1], "[5e-4, 1]"])
def test_numbers__all_ways_to_write_a_list(given):
    assert numbers("lrs", given, float) == (5e-4, 1.0)


def test_numbers__say_what_is_none():
    with pytest.raises(ConfigurationError) as stop:
        numbers("seeds", "0,x", int)
    assert str(stop.value) == "seeds is '0,x', expected whole numbers separated by commas."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ("full", "magic")}, f"There is no method 'magic'; the methods are {', '.join(METHODS)}."),
        ({"methods": ()}, f"methods is [], expected one or more of {', '.join(METHODS)}."),
        ({"methods": ("full", "full")}, "methods is ['full', 'full'], expected each of them once."),
        ({"lrs": ()}, "lrs is [], expected one or more learning rates, such as 5e-4,1.5e-3."),
        ({"lrs": (0.1, -0.1)}, "lrs is [0.1, -0.1], expected numbers above 0."),
        ({"lrs": (float("nan"),)}, "lrs is [nan], expected numbers above 0."),
        ({"lrs": {"full": (0.1,)}}, "lrs is ['full'], expected those of full, head."),
        ({"lrs": {"full": (0.1,), "head": (0,)}}, "lrs.head is [0], expected numbers above 0."),
        ({"seeds": ()}, "seeds is [], expected one or more whole numbers, such as 0,1,2."),
        ({"seeds": (-1,)}, "seeds is [-1], expected whole numbers of 0 or more."),
        ({"mode": "best"}, "mode is 'best', expected 'max' or 'min'."),
        ({"jobs": 0}, "jobs is 0, expected 1 or more."),
        ({"timing_steps": 0}, "timing_steps is 0, expected 1 or more."),
        ({"max_epoch_factor": 0.5}, "max_epoch_factor is 0.5, expected 1 or more."),
        (
            {"method_options": {"bsr": {"blocks": 3}}},
            "method_options has 'bsr', which is not compared; the methods are full, head.",
        ),
    ],
)
def test_settings__mistakes(given, message, make_settings):
    with pytest.raises(ConfigurationError) as stop:
        make_settings(**given)
    assert str(stop.value) == message


def test_better__both_ways(make_settings):
    assert make_settings(mode="max").better(2, 1)
    assert make_settings(mode="min").better(1, 2)
    assert not make_settings(mode="min").better(1, 1)
