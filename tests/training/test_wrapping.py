import itertools

import pytest

from lightning_eff.training.wrapping import Wrapper


class Target:
    def run(self, word="inner"):
        return [word]


def _named(name):
    return lambda method, *args, **kwargs: [name, *method(*args, **kwargs)]


def test_arguments_and_results_pass_through():
    target = Target()
    Wrapper(target, "run", _named("a"))
    Wrapper(target, "run", _named("b"))
    assert target.run("x") == ["b", "a", "x"]
    assert Target().run() == ["inner"]  # the class is left alone


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("own", [False, True])
def test_leaving_in_any_order_puts_back_what_was_there(order, own):
    target = Target()
    if own:  # the instance has something of its own under that name, as a user's or a library's patch
        target.run = mine = lambda: ["mine"]
    wrappers = [Wrapper(target, "run", _named(name)) for name in "abc"]
    left = dict(enumerate("abc"))
    for index in order:
        wrappers[index].remove()
        wrappers[index].remove()  # harmless
        del left[index]
        assert target.run() == [*reversed(left.values()), "mine" if own else "inner"]
    assert vars(target) == ({"run": mine} if own else {})


def test_behind_a_foreign_wrapper_it_only_calls_on():
    target = Target()
    wrapper = Wrapper(target, "run", _named("a"))
    inner = target.run
    target.run = lambda: ["foreign", *inner()]
    wrapper.remove()
    assert target.run() == ["foreign", "inner"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("own", [False, True])
def test_the_innermost_stands_behind_all_others(order, own):
    target = Target()
    if own:
        target.run = mine = lambda: ["mine"]
    wrappers = [Wrapper(target, "run", _named("a")), Wrapper(target, "run", _named("b"))]
    wrappers.append(Wrapper(target, "run", lambda run: ["in its place"], innermost=True))
    assert target.run() == ["b", "a", "in its place"]
    left = {0: "a", 1: "b"}
    for index in order:
        wrappers[index].remove()
        left.pop(index, None)
        method = ["mine" if own else "inner"] if wrappers[2]._removed else ["in its place"]
        assert target.run() == [*reversed(left.values()), *method]
    assert vars(target) == ({"run": mine} if own else {})
    alone = Wrapper(target, "run", lambda run: ["in its place"], innermost=True)
    assert target.run() == ["in its place"]
    alone.remove()
    assert vars(target) == ({"run": mine} if own else {})
