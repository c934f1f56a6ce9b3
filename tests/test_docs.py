"""Every page's code runs and prints what the page says; figures, commands and links are there.

Numbers in outputs depend on the machine and on versions; the words around them do not, and they hold the verdicts.
"""

import functools
import importlib.util
import re
import shlex
import tempfile
import tomllib
from pathlib import Path

import jax
import pytest

from benchmarks.record import module_at
from partime_mcmc import cli

pytestmark = pytest.mark.short_runs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"][
    "Repository"
]
code_blocks = module_at(DOCS / "code_blocks.py", "code_blocks")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*code_blocks.PAGES, ROOT / "CONTRIBUTING.md")
}
BLOCKS = {name: code_blocks.blocks_of(text) for name, text in TEXTS.items()}
# Pages whose code compiles for more than half a minute; the nightly tests run them.
LONG = {name for name in BLOCKS if name.startswith("docs/gallery/")}


@pytest.fixture(autouse=True)
def settings_restored():
    """The global setting that a page may change, as it was."""
    before = jax.config.values["jax_enable_x64"]
    yield
    jax.config.update("jax_enable_x64", before)


@functools.cache
def page_run(name):
    """A page's code, run once in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return code_blocks.run(ROOT / name, Path(folder))


def printed_by(name):
    """What each block of a page prints."""
    if "set_host_device_count" in TEXTS[name]:  # which JAX looks at when it starts
        with tempfile.TemporaryDirectory() as folder:
            return code_blocks.run_apart(ROOT / name, Path(folder))
    return page_run(name).printed


def pages_with_code():
    for name, blocks in BLOCKS.items():
        # The README's example is the first one of "Getting started", which runs it.
        if blocks and name != "README.md":
            marks = [pytest.mark.slow] * (name in LONG)
            # ArviZ warns of points that leave-one-out cross-validation cannot do without, which its page looks at, of its
            # successor, and of what pandas will change: by version, and nothing of ours.
            if "import arviz" in TEXTS[name]:
                marks.append(pytest.mark.filterwarnings("ignore"))
            yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(pages_with_code()))
def test_code_prints_what_the_page_says(name):
    for block, printed in zip(BLOCKS[name], printed_by(name), strict=True):
        assert (block.output is None) == (not printed), "an output is not shown, or is not printed"
        if block.output is not None:
            said = code_blocks.without_numbers(block.output)
            assert said and code_blocks.without_numbers(printed) == said


def test_the_readmes_example_is_that_of_getting_started():
    assert BLOCKS["README.md"] == BLOCKS["docs/getting-started.md"][:1]


def test_every_block_of_code_is_found():
    for name, text in TEXTS.items():
        assert len(BLOCKS[name]) == text.count("```python\n"), name
        assert sum(block.output is not None for block in BLOCKS[name]) == text.count("```text"), (
            name
        )


def test_an_output_with_other_words_is_noticed():
    words = code_blocks.without_numbers
    said = "CONVERGED: R-hat 1.001 at x[0] (wanted at most 1.01); 800 effective draws of x[0] (wanted 400)\n"
    assert words(said) == words(said.replace("x[0]", "log density").replace("1.001", " 1.0004"))
    for old, new in (("CONVERGED", "UNDECIDED"), ("; 800", ": 800"), ("effective draws", "draws")):
        assert words(said) != words(said.replace(old, new)), new


def test_a_pages_output_is_renewed():
    page = '```python\nprint(1 + 1)\n```\n\n```text title="Output"\n3\n```\nand\n```python\nx = 1\n```\n'
    assert code_blocks.with_outputs(page, ["2\n", ""]) == page.replace("\n3\n", "\n2\n")


def test_rows_of_the_tutorial_pass_the_suite():
    """A kernel, a linearizer and a solver as the tutorial adds them, through tests of the catalogues."""
    names = page_run("docs/extending.md").names
    kernels = module_at(ROOT / "tests" / "kernels" / "test_kernels.py", "tutorial_kernels")
    kernels.test_paths_are_blackjaxs_own_loop(names["kernel_row"])
    kernels.test_certificate_and_decisions_agree_with_blackjax(names["kernel_row"])
    oracle = module_at(ROOT / "tests" / "engine" / "test_oracle.py", "tutorial_oracle")
    for name in ("linearizer_row", "solver_row"):
        for dynamics in ("tanh network", "accept or reject", "logistic map"):
            row = oracle.by_name(oracle.DYNAMICS, dynamics)
            oracle.test_equals_the_sequential_path(names[name], row, 17, "float64")


def test_commands_have_the_options_that_pages_give_them():
    commands = [
        line.split("#")[0]
        for text in TEXTS.values()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in re.split(r"\n|&&", block)
        if line.strip().startswith("partime-mcmc")
    ]
    assert len(commands) >= 7
    for command in commands:
        cli._parser().parse_args(shlex.split(command)[1:])


def test_benchmarks_that_pages_name_are_there():
    named = {name for text in TEXTS.values() for name in re.findall(r"-m (benchmarks\.\w+)", text)}
    assert len(named) > 8
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


def test_files_that_pages_name_are_there():
    """Links, pictures, and paths of the checkout in code font."""
    for name, text in TEXTS.items():
        here = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            # Pages of the API are generated, one for each package.
            package = re.fullmatch(r"(?:docs/)?api/(\w+)\.md", target)
            generated = package and (ROOT / "partime_mcmc" / package[1]).is_dir()
            assert generated or (here / target).exists(), f"{name}: {target}"
        for kind, target in re.findall(rf"\({ADDRESS}/(raw|blob|tree)/main/([^)#]*)", text):
            assert (ROOT / target).is_dir() == (kind == "tree"), f"{name}: {target}"
            assert (ROOT / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w./-]+\.\w+)`", text):
            assert path == "docs/PAGE.md" or (ROOT / path).exists(), f"{name}: {path}"


def test_figures_are_drawn_by_code_and_shown(monkeypatch):
    pytest.importorskip("matplotlib")
    figures = module_at(DOCS / "draw_figures.py", "draw_figures")
    files = {path.stem for path in (DOCS / "figures").glob("*.svg")}
    shown = {name for text in TEXTS.values() for name in re.findall(r"figures/(\w+)\.svg", text)}
    assert set(figures.FIGURES) == files == shown


def test_what_the_figures_show_is_so(double):
    figures = module_at(DOCS / "draw_figures.py", "draw_figures")
    shooting = figures.shooting_passes()
    assert (shooting["passes"][-1].reshape(-1, 2) == shooting["exact"]).all()
    assert shooting["rolled"][1].sum() < shooting["rolled"][0].sum() / 2
    residuals = figures.residuals_of_paths(60)
    assert residuals["certified"].tolist() == [True, False]


def test_links_of_the_readme_work_on_other_pages():
    """The index of packages shows it, too, where a relative link leads nowhere."""
    targets = re.findall(r"\]\(([^)]*)\)", TEXTS["README.md"])
    assert len(targets) > 10
    assert [one for one in targets if not one.startswith(f"{ADDRESS}/")] == []


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) < 750
    assert TEXTS["README.md"].count("\n") < 100
