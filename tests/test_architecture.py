"""The layout is kept: who may import whom, and what importing must not do.

By reading the source, so that a rule is broken at the line that breaks it.
"""

import ast
import graphlib
import json
import pathlib
import subprocess
import sys

import pytest

import partime_mcmc

ROOT = pathlib.Path(partime_mcmc.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))

# A module imports lower ranks and its own, but for nothing that comes back to it. Named by the first part of its path below
# the package.
RANKS = [
    {"types", "captured_data"},
    {"validation", "tracing", "executions", "host_keys"},
    {"engine", "scan", "linearize", "solvers"},
    {"compile_cache", "kept_programs", "extras"},
    {"rnn", "kernels", "certify"},
    {"forgetting"},
    {"diagnostics"},
    {"warmup"},
    {"sampling", "storage", "distributed"},
    {"numpyro"},
    {"models"},
    {"__init__"},
    # Programs use the package's own front.
    {"cli"},
    {"__main__"},
]

# Who may import these, as paths below the package; everybody else may not, not even inside a function.
FENCES = {
    "blackjax": ("kernels/", "warmup/"),
    "numpyro": ("numpyro/", "models/"),
    "arviz": ("diagnostics/arviz.py",),
    "arviz_base": ("diagnostics/arviz.py",),
    "arviz_stats": ("diagnostics/arviz.py",),
    "arviz_plots": ("diagnostics/arviz.py",),
    "xarray": ("diagnostics/arviz.py", "storage/"),
    "matplotlib": ("diagnostics/plots.py",),
    "flax": ("rnn/adapters.py",),
    "equinox": ("rnn/adapters.py",),
    "zarr": ("storage/",),
}
# These are imported inside functions only, so that nobody waits for what he does not use.
LAZY = {
    "matplotlib": (),
    "flax": (),
    "equinox": (),
    "xarray": (),
    "arviz": (),
    "zarr": ("storage/zarr_files.py",),
}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def rank_of(dotted):
    """The rank of a module, by its dotted name below the package."""
    first = dotted.split(".")[0] or "__init__"
    for rank, members in enumerate(RANKS):
        if first in members:
            return rank
    raise AssertionError(f"{dotted} has no rank: add it to RANKS")


def imports_of(tree):
    """`(line, dotted name, whether inside a function)` of every import; a from-import gives each name it takes."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}", id(node) in inside


def breaches(name, source):
    """Every broken import rule of one file, as text."""
    dotted = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for line, imported, lazy in imports_of(ast.parse(source)):
        top = imported.split(".")[0]
        if top == "partime_mcmc":
            below = imported.removeprefix("partime_mcmc").removeprefix(".")
            # `from partime_mcmc import deer` takes a name from the package's own front.
            front = below.split(".")[0] not in set().union(*RANKS)
            if rank_of("__init__" if front else below) > rank_of(dotted):
                yield f"{name}:{line} imports {imported}, of a higher rank"
        if top in FENCES and not name.startswith(FENCES[top]):
            yield f"{name}:{line} imports {imported}; only {FENCES[top]} may"
        if top in LAZY and not lazy and name not in LAZY[top]:
            yield f"{name}:{line} imports {imported} at the top; import it in the function that needs it"
        if imported.startswith("jax._src"):
            yield f"{name}:{line} imports {imported}, which is private"
        if imported == "jax.config" or (top == "os" and "environ" in imported):
            yield f"{name}:{line} imports {imported}: the library reads and sets nothing global"


@every_file
def test_imports_keep_to_their_ranks_and_fences(path):
    assert list(breaches(name_of(path), path.read_text())) == []


def modules_imported(path):
    """Files of the package that a file imports, inside functions or not."""
    for _, imported, _ in imports_of(ast.parse(path.read_text())):
        if imported.startswith("partime_mcmc."):
            found = ROOT.parent.joinpath(*imported.split("."))
            for file in (found.with_suffix(".py"), found.parent.with_suffix(".py")):
                if file in FILES:
                    yield file
                    break


def test_there_is_no_circle_of_imports():
    sorter = graphlib.TopologicalSorter({path: set(modules_imported(path)) for path in FILES})
    # Raises where a module imports another one that comes back to it.
    assert len(list(sorter.static_order())) == len(FILES)


def test_a_circle_is_found():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


@pytest.mark.parametrize(
    "name, source",
    [
        ("scan/affine.py", "from partime_mcmc.kernels import Kernel"),
        ("types.py", "def f():\n    from partime_mcmc.validation import check_has"),
        ("diagnostics/compare.py", "import partime_mcmc.sampling.draws"),
        ("engine/solve.py", "from partime_mcmc import deer"),
        ("engine/solve.py", "import blackjax"),
        ("sampling/sample.py", "from blackjax.mcmc import hmc"),
        ("kernels/kernel.py", "def f():\n    import arviz"),
        ("diagnostics/plots.py", "import matplotlib.pyplot as plt"),
        ("diagnostics/html.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("tracing.py", "from jax._src import core"),
        ("tracing.py", "import jax._src.core"),
    ],
)
def test_a_breach_is_found(name, source):
    assert list(breaches(name, source))


@pytest.mark.parametrize(
    "name, source",
    [
        ("solvers/newton.py", "from partime_mcmc.solvers.base import Proposal"),
        ("diagnostics/plots.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("warmup/warmup.py", "import blackjax"),
        ("cli.py", "from partime_mcmc.models import eight_schools"),
    ],
)
def test_what_is_allowed_is_not_a_breach(name, source):
    assert not list(breaches(name, source))


@every_file
def test_nothing_global_is_set_or_read(path):
    if name_of(path).startswith(("cli.py", "__main__.py")):
        pytest.skip("a program, not a library: it may choose its own settings")
    if name_of(path) == "distributed/mesh.py":
        pytest.skip(
            "joins processes into one run, with JAX's preemption service off while it does so"
        )
    if name_of(path) == "compile_cache.py":
        pytest.skip("chooses the folder of JAX's compilation cache where the user has not")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text, forbidden = (
                ast.unparse(node),
                ("os.environ", "os.getenv", "os.putenv", "jax.config.update"),
            )
            assert text not in forbidden, f"line {node.lineno}: {text}"


def public_definitions(tree):
    """Public functions and classes of a module, and the public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node


@every_file
def test_everything_public_is_described(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), "the module has no docstring"
        for name, node in public_definitions(tree):
            assert ast.get_docstring(node), f"{name} has no docstring"


def test_every_module_has_a_good_name():
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), name_of(path)
        rank_of(name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"))


PROBE = """
import json, os, sys
environment = dict(os.environ)
import jax
import blackjax
# What the neighbours set up when they are imported is theirs (BlackJAX makes an array); what comes on top is ours.
before, arrays = dict(jax.config.values), len(jax.live_arrays())
import partime_mcmc
print(json.dumps({
    "arrays": len(jax.live_arrays()) - arrays,
    "config": sorted(name for name in before if before[name] != jax.config.values[name]),
    "environment": environment == dict(os.environ),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""


def test_importing_does_nothing_but_import():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["arrays"] == 0
    assert seen["config"] == []
    assert seen["environment"]
    assert not {"arviz", "matplotlib", "flax", "equinox"} & set(seen["modules"])
