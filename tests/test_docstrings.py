"""Every public name has an example in its docstring, and it runs and gives what it says."""

import doctest
import inspect

import pytest

import partime_mcmc

# What joins several processes cannot be run in one; `tests/distributed` runs it.
NOT_RUN = {"hosts"}


def example_of(name):
    text = inspect.getdoc(getattr(partime_mcmc, name)) or ""
    return doctest.DocTestParser().get_doctest(text, {}, name, None, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: those about stores keep one and the same run there, which is drawn once."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", partime_mcmc.__all__)
def test_the_example_gives_what_it_says(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    example, said = example_of(name), []
    skipped = [one for one in example.examples if one.options.get(doctest.SKIP)]
    assert bool(skipped) == (name in NOT_RUN)
    assert "\nExamples:\n" in (example.docstring or ""), "there is no example"
    assert not doctest.DocTestRunner().run(example, out=said.append).failed, "".join(said)


def test_a_wrong_example_is_noticed(folder):
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(example, out=lambda text: None).failed == 1
