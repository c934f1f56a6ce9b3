"""Does a test notice when the code is wrong? `python -m benchmarks.mutations --out DIR`.

A mutant is the package with one small mistake: a comparison flipped, an operator swapped, a number changed by one, a decision
negated, `min` for `max`, `any` for `all`, the branches of a condition exchanged. From every module whose mistakes would make a path
or its certificate wrong mutants are drawn at random, with a fixed seed, one per module and round, and the tests that belong to the
module, and then all fast tests (`pytest -m fast`) of the folders it belongs to, are run until one fails:

    killed      a test fails, or the package can no longer be imported
    timed out   the tests take more than three times as long as without the mistake: loops that do not end
    survived    no test notices; either the mistake changes nothing that is promised, or a test is missing

Docstrings, annotations, messages of errors, decorators and the right sides of type aliases are left as they are. The tests run in a
copy of the checkout. Compiled programs are kept in a folder of that run, which hides nothing: a program is found there by what it
computes. Every run begins where the last one ended, so it can be cut into pieces (`--limit`). The tests chosen here are the ones
that take seconds. What they do not notice is tried once more with all tests of the folders but the slow ones (`noticed by`), unless
`EQUIVALENT` says why nothing that is promised changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import OUT, keep

ROOT = Path(__file__).resolve().parent.parent
SEED, ROUNDS = 7, 2
# Beyond three times what the tests take without the mistake, for what is compiled anew.
_MARGIN_SECONDS = 20
# What the tests of a folder may take.
_LONGEST_SECONDS = 1200


class Tests(NamedTuple):
    """Tests that belong to a module: files, folders or single tests, and which of them (pytest's `-k` and `-m`)."""

    paths: tuple[str, ...]
    keyword: str = ""
    marker: str = "not slow"

    @property
    def name(self) -> str:
        """What they are known by."""
        return " ".join((*self.paths, "-k", self.keyword, "-m", self.marker))


_VERDICTS = "tests/engine/test_verdicts.py"
_ERRORS = "tests/engine/test_validation_errors.py"
_ORACLE = "tests/engine/test_oracle.py"
_THEOREM = "tests/engine/test_theorem.py"
_SHOOTING = "tests/solvers/test_shooting.py"
_CERTIFY = "tests/certify/test_certify.py"
_KERNELS = "tests/kernels/test_kernels.py"
_COUPLING = "tests/kernels/test_coupling.py"
_LEAPFROG = "tests/kernels/test_leapfrog.py"
_PARTS = "tests/solvers/test_parts.py"
# Of the long files the tests that take seconds each, or those of several that look at the same.
_NO_LONG = (
    "not (nan_at_step_500 or chaos or growth or overflow_of or nan_jacobian or below_the_floor or "
    "first_derivatives or any_length or falls_back or corrections_make)"
)
_WORK = (f"{_ORACLE}::test_work_is_counted", _PARTS)
_BURST = f"{_ORACLE}::test_windows_shorter_than_a_burst_of_rejections"
_LOOP = Tests((_VERDICTS, *_WORK, _ERRORS), _NO_LONG)
_SEGMENTS = Tests(
    (_SHOOTING, "tests/solvers/test_segment_rule.py", _PARTS),
    "one_segment or tolerance_zero or evaluations_are or have_met or drawn_ahead or finished_from or time_can or overflows "
    "or rule or fill or fewer_lanes or written_back "
    "or share_the_lanes or corrections_make or linear_system or finished",
)
_CHAINS = "tests/kernels/test_kernels.py::test_certificate_and_decisions_agree_with_blackjax"

MODULES: dict[str, Tests] = {
    "engine/solve.py": _LOOP,
    "engine/solution.py": _LOOP,
    "engine/windows.py": Tests((*_LOOP.paths, _BURST), _LOOP.keyword),
    "engine/dynamics.py": _LOOP,
    "engine/recipes.py": _LOOP,
    "engine/time_axis.py": Tests(
        ("tests/scan/test_scan_laws.py::test_the_time_axis_on_small_numbers", *_LOOP.paths),
        _LOOP.keyword,
    ),
    "engine/adjoint.py": Tests(("tests/engine/test_derivatives.py",), _NO_LONG),
    "engine/iterates.py": Tests(("tests/engine/test_iterates.py",)),
    "solvers/base.py": Tests((*_WORK, _THEOREM), "not elk"),
    "solvers/newton.py": Tests((*_WORK, _THEOREM), "not elk"),
    "solvers/kalman.py": Tests(
        (_VERDICTS, "tests/engine/test_iterates.py", _PARTS),
        "(elk or parts) and not (nan_at_step_500 or chaos or overflow_of)",
    ),
    "solvers/sequential.py": _SEGMENTS,
    "solvers/shooting.py": _SEGMENTS,
    "solvers/segments.py": _SEGMENTS,
    "solvers/narrowing.py": _SEGMENTS,
    "solvers/interfaces.py": _SEGMENTS,
    "solvers/hoist.py": _SEGMENTS,
    "solvers/segmented_scan.py": Tests(
        ("tests/solvers/test_segment_rule.py", "tests/rnn/test_rnn.py"),
        "rule or batch or short_sequences or masked or kinks",
    ),
    "certify/certificate.py": Tests((_CERTIFY, "tests/certify/test_repeated.py")),
    "certify/independent.py": Tests((_CERTIFY,)),
    "certify/recorded.py": Tests(("tests/certify/test_recorded.py",)),
    "certify/step_record.py": Tests((_CERTIFY,)),
    "kernels/builders.py": Tests(
        (_KERNELS, _LEAPFROG),
        "builders or bad_ or noise_scale or quarter or whitened or kind_of or drifts",
    ),
    "kernels/coupling.py": Tests((_COUPLING,)),
    "kernels/multishift_hmc.py": Tests((_COUPLING, _LEAPFROG)),
    "kernels/leapfrog.py": Tests((_LEAPFROG,)),
    "kernels/kernel.py": Tests(
        (_CHAINS, _KERNELS),
        "mala or keys or begins or legacy or own_ or frozen or algorithm or empty",
    ),
    "kernels/whitening.py": Tests((_KERNELS,), "whiten or metric or inverse or roots"),
    "forgetting/coalescence.py": Tests(
        ("tests/forgetting/test_forgetting.py",), "meet or survival or trees or drives_and or begin"
    ),
}

# What survivors were on inspection, by module, line's text and change.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "solvers/hoist.py",
        "_STATES, _IN_ANY_CASE = 4, 16",
        "16 -> 17",
    ): "how much memory hoisting may take is a choice, and any choice gives the same numbers",
    (
        "engine/dynamics.py",
        "if jax.tree.structure(initial) == jax.tree.structure(0) and flat.shape == jnp.shape(initial):",
        "0 -> 1",
    ): "any number has the structure of a leaf",
    (
        "engine/adjoint.py",
        "most = min(num_steps, max(1, _BLOCK_NUMBERS // max(previous.shape[1], 1)))",
        "1 -> 2",
    ): "how many steps are evaluated side by side is a choice of memory",
    (
        "solvers/kalman.py",
        "shares = right / jnp.where(largest > 0, largest, 1)",
        "1 -> 2",
    ): "the other case divides zeros",
    (
        "solvers/narrowing.py",
        "only_equal = ((relative == 0) & (True if absolute is None else absolute == 0)).any()",
        "0 -> 1",
    ): "it guards against devices that round differently in batches of other widths, which this one does not",
    (
        "engine/adjoint.py",
        "most = min(num_steps, max(1, _BLOCK_NUMBERS // max(previous.shape[1], 1)))",
        "max -> min",
    ): "how many steps are evaluated side by side is a choice of memory",
    (
        "engine/adjoint.py",
        "most = min(num_steps, max(1, _BLOCK_NUMBERS // max(previous.shape[1], 1)))",
        "_BLOCK_NUMBERS // max(previous.shape[1], 1) -> _BLOCK_NUMBERS * max(previous.shape[1], 1)",
    ): "how many steps are evaluated side by side is a choice of memory",
    (
        "engine/iterates.py",
        "return nanaware_max(self.residuals, axis=-1)",
        "-1 -> 1",
    ): "the last axis of two is the second",
    (
        "engine/adjoint.py",
        "unit = DEFAULT_ULPS / 4 * jnp.finfo(right.dtype).eps",
        "DEFAULT_ULPS / 4 -> DEFAULT_ULPS * 4",
    ): "by how many ulps segments of the adjoint may miss each other is a choice, and derivatives promise fewer digits",
    (
        "engine/iterates.py",
        "num_iterations: int = 50,",
        "50 -> 51",
    ): "a default",
    (
        "engine/iterates.py",
        "jax.random.key(0) if key is None else key,",
        "0 -> 1",
    ): "a default",
    (
        "certify/step_record.py",
        "jax.random.split(randomness)[1], jnp.shape(rate), jnp.result_type(rate)",
        "1 -> 2",
    ): "JAX takes the last of two keys for the third",
    (
        "kernels/coupling.py",
        "half = (size + 1) // 2",
        "1 -> 2",
    ): "two more uniforms are drawn, which nobody uses",
    (
        "kernels/multishift_hmc.py",
        "return draw_multishift_noise(jax.random.split(key)[1], flat.size, flat.dtype)",
        "1 -> 2",
    ): "JAX takes the last of two keys for the third",
    (
        "kernels/multishift_hmc.py",
        "count = -(-num_steps // every) + 1 if num_steps else 0",
        "-num_steps // every -> -num_steps * every",
    ): "more noise is drawn than anybody uses",
    (
        "kernels/whitening.py",
        "if asymmetry > 1e-3 * float(np.abs(covariance).max()):",
        "asymmetry > 1e-3 * float(np.abs(covariance).max()) -> asymmetry >= 0.001 * float(np.abs(covariance).max())",
    ): "matrices that are asymmetric by just a thousandth",
    (
        "certify/independent.py",
        'return 32 if jax.default_backend() == "cpu" else 1024',
        "32 -> 33",
    ): "how many steps are evaluated side by side is a choice of speed",
    (
        "solvers/hoist.py",
        "or not any(equation.primitive.name in _COSTLY for equation in early)",
        "equation.primitive.name in _COSTLY -> equation.primitive.name not in _COSTLY",
    ): "what is computed ahead is a choice of speed, and any choice gives the same numbers",
    (
        "engine/solution.py",
        "DEFAULT_ULPS = 128",
        "128 -> 129",
    ): "by how many ulps a path may miss its recurrence, unless a tolerance is given, is a choice",
    (
        "engine/adjoint.py",
        "most = min(num_steps, max(1, _BLOCK_NUMBERS // max(previous.shape[1], 1)))",
        "min -> max",
    ): "how many steps are evaluated side by side is a choice of memory",
    (
        "solvers/hoist.py",
        "allowed = max(_STATES * _bytes(inputs[1]), 4 * _IN_ANY_CASE)",
        "4 -> 5",
    ): "how much memory hoisting may take is a choice, and any choice gives the same numbers",
    (
        "solvers/segments.py",
        '_LANES = {"cpu": 128}',
        "128 -> 129",
    ): "how many lanes fill a processor is a choice of speed",
    (
        "solvers/segmented_scan.py",
        "LEAN_LOOPS = jax.__version_info__ >= (0, 12)",
        "12 -> 13",
    ): "it decides what is faster, and either way gives the same numbers",
    (
        "solvers/narrowing.py",
        "only_equal = ((relative == 0) & (True if absolute is None else absolute == 0)).any()",
        "((relative == 0) & (True if absolute is None else absolute == 0)).any -> ((relative == 0) & (True if absolute is None else absolute == 0)).all",
    ): "it guards against devices that round differently in batches of other widths, which this one does not",
    (
        "solvers/base.py",
        "good = jnp.stack(",
        "jnp.stack( [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in linear] ).all -> jnp.stack([jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in linear]).any",
    ): "the linear part of every kind of map is one array",
    (
        "kernels/kernel.py",
        "return self.algorithm.init(position, jax.random.key(0) if rng_key is None else rng_key)",
        "0 -> 1",
    ): "a key for kernels that draw in the beginning, where none is given",
    (
        "solvers/segmented_scan.py",
        "return next((n for n in range(most, most // 2, -1) if num_steps % n == 0), most)",
        "num_steps % n -> num_steps * n",
    ): "how many segments there are is a choice of speed, and any choice gives the same numbers",
    (
        "kernels/multishift_hmc.py",
        "if known and turned_angle(float(step_size), 1, float(drift_fraction)) == math.inf:",
        "1 -> 2",
    ): "two steps are as stable as one",
    (
        "kernels/kernel.py",
        "counted = self.algorithm.count(start, num_steps + 1)",
        "1 -> 2",
    ): "one more count is made, which nobody reads",
    (
        "solvers/segments.py",
        'elif one_lane is not None and jax.default_backend() == "cpu":',
        "jax.default_backend() == \"cpu\" -> jax.default_backend() != 'cpu'",
    ): "whether chains with parameters of their own are solved side by side is a choice of speed",
    (
        "kernels/coupling.py",
        "both, part = -2 * jnp.log(1 - lengths), 0.5 + 0.5 * jnp.cos(2 * jnp.pi * angles)",
        "0.5 + 0.5 * jnp.cos(2 * jnp.pi * angles) -> 0.5 - 0.5 * jnp.cos(2 * jnp.pi * angles)",
    ): "the same pairs of normals in the other order, which have the same law",
    (
        "kernels/leapfrog.py",
        "_UNROLLED = 8",
        "8 -> 9",
    ): "how many steps are written out one after another is a choice of speed",
}
# All tests of the folders that a module's own folder leans on, for what the tests that take seconds did not notice.
FOLDERS = {
    "engine": ("tests/engine", "tests/scan", "tests/solvers"),
    "solvers": ("tests/solvers", "tests/engine", "tests/rnn"),
    "certify": ("tests/certify", "tests/kernels", "tests/sampling/test_sample.py"),
    "kernels": ("tests/kernels", "tests/warmup", "tests/forgetting"),
    "forgetting": ("tests/forgetting", "tests/kernels"),
}


class Mutant(NamedTuple):
    """One mistake.

    Attributes:
        begin: Where the text that is replaced begins, in bytes.
        end: Where it ends.
        text: What stands there instead.
        line: Its line, from 1.
        change: Before and after, in words.
    """

    begin: int
    end: int
    text: str
    line: int
    change: str


_OPERATORS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
_PAIRS = (("min", "max"), ("minimum", "maximum"), ("any", "all"), ("argmin", "argmax"))
_NAMES = dict([*_PAIRS, *((b, a) for a, b in _PAIRS)])


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in a node's place by one mistake."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                other = copy.deepcopy(node)
                other.ops[place] = _OPERATORS[type(operator)]()
                yield other
        case ast.BinOp() | ast.BoolOp() if type(node.op) in _OPERATORS:
            other = copy.deepcopy(node)
            other.op = _OPERATORS[type(node.op)]()
            yield other
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=(int() | float()) as number):
            yield ast.Constant(number + 1)
        case ast.Name(id=name) if name in _NAMES:
            yield ast.Name(_NAMES[name])
        case ast.Attribute(attr=name) if name in _NAMES:
            yield ast.Attribute(node.value, _NAMES[name])
        case ast.Call(func=ast.Attribute(attr="where"), args=[test, one, two]):
            yield ast.Call(node.func, [test, two, one], node.keywords)
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module's text, in order of their places."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node in _code(ast.parse(source)):
        for other in changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            before = " ".join(source.encode()[begin:end].decode().split())
            text = ast.unparse(other)
            found.append(Mutant(begin, end, f"({text})", node.lineno, f"{before} -> {text}"))
    return sorted(found)


def _code(node: ast.AST) -> Iterator[Any]:
    """The nodes whose values matter, this one and below."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return
        case ast.Call(func=ast.Name(id="isinstance")):
            return
        case ast.Assign(value=ast.BinOp(op=ast.BitOr(), left=ast.Name() | ast.BinOp())):
            # Of a module: the alias of a type. Masks of arrays stand in functions and are no plain names only.
            if node.col_offset == 0:
                return
        case _:
            pass
    yield node
    left_out = {"annotation", "returns", "decorator_list"}
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in left_out:
                yield from _code(child)


def drawn(module: str, rounds: int) -> list[Mutant]:
    """The mutants of a module that are tried, in order: more rounds begin with the same ones."""
    everything = mutants((ROOT / "partime_mcmc" / module).read_text(encoding="utf-8"))
    random.Random(f"{SEED} {module}").shuffle(everything)
    return everything[:rounds]


def run_tests(checkout: Path, tests: Tests, limit: float, cache: Path) -> tuple[str, str]:
    """Run tests until one fails: `(killed, survived or timed out, the test that failed)`."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=-q --strict-markers", "-m", tests.marker, *tests.paths]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    try:
        done = subprocess.run(
            [*command, *(("-k", tests.keyword) if tests.keyword else ())],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return "timed out", ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return ("killed" if done.returncode else "survived"), (failed or [""])[0]


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a mutant is known by: lines move."""
    return row["module"], row["text"], row["change"]


def row_of(module: str, mutant: Mutant) -> dict[str, Any]:
    """The beginning of a mutant's row."""
    text = (ROOT / "partime_mcmc" / module).read_text(encoding="utf-8").splitlines()
    place = {"module": module, "line": mutant.line, "text": text[mutant.line - 1].strip()}
    return place | {"change": mutant.change}


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout, in which mistakes can be made."""
    with tempfile.TemporaryDirectory() as folder:
        leave = shutil.ignore_patterns(".git", "__pycache__", "figures", "*.egg-info")
        yield Path(shutil.copytree(ROOT, Path(folder) / "checkout", ignore=leave))


@contextlib.contextmanager
def mistaken(checkout: Path, module: str, mutant: Mutant) -> Iterator[None]:
    """A copy with this mistake, inside."""
    file = checkout / "partime_mcmc" / module
    source = file.read_bytes()
    file.write_bytes(source[: mutant.begin] + mutant.text.encode() + source[mutant.end :])
    try:
        yield
    finally:
        file.write_bytes(source)


def tried(
    rounds: int,
    earlier: list[dict],
    seconds: dict[str, float],
    until: float,
    only: str,
    cache: Path,
) -> Iterator[dict]:
    """Try the mutants that were not tried earlier, round by round; a row each."""
    known = {key(row) for row in earlier}
    with copied() as checkout:
        for number, (module, tests) in itertools.product(range(rounds), MODULES.items()):
            chosen = drawn(module, rounds)
            if number >= len(chosen) or only not in module:
                continue
            row = row_of(module, chosen[number])
            if key(row) in known:
                continue
            if time.monotonic() > until:
                return
            row["seconds"] = 0.0
            for some in (tests, Tests(FOLDERS[module.split("/")[0]], marker="fast")):
                if some.name not in seconds:
                    begin = time.monotonic()
                    outcome, failed = run_tests(checkout, some, _LONGEST_SECONDS, cache)
                    if outcome != "survived":
                        raise RuntimeError(f"{module}: {failed or outcome} without any mistake")
                    seconds[some.name] = time.monotonic() - begin
                begin, limit = time.monotonic(), 3 * seconds[some.name] + _MARGIN_SECONDS
                with mistaken(checkout, module, chosen[number]):
                    row["outcome"], row["by"] = run_tests(checkout, some, limit, cache)
                row["seconds"] += time.monotonic() - begin
                if row["outcome"] != "survived":
                    break
            yield row


def looked_at_again(rows: list[dict], until: float, cache: Path) -> Iterator[dict]:
    """Run the tests of whole folders for what survived and is not explained; rows with the test that `noticed`, or `""`."""
    with copied() as checkout:
        for row in rows:
            if row["outcome"] != "survived" or "noticed" in row or key(row) in EQUIVALENT:
                continue
            if time.monotonic() > until:
                return
            source = (ROOT / "partime_mcmc" / row["module"]).read_text(encoding="utf-8")
            # Two mistakes of one line may read the same: both have to be noticed.
            alike = [one for one in mutants(source) if key(row_of(row["module"], one)) == key(row)]
            found = [noticed_by(checkout, row["module"], mutant, cache) for mutant in alike]
            yield row | {"noticed": found[-1] if all(found) else ""}


def noticed_by(checkout: Path, module: str, mutant: Mutant, cache: Path) -> str:
    """The test that notices a mistake, of those of its module, then of whole folders; empty if none does."""
    of_module, of_folder = MODULES[module], FOLDERS[module.split("/")[0]]
    with mistaken(checkout, module, mutant):
        # Tests may have been written since.
        outcome, failed = run_tests(checkout, of_module, _LONGEST_SECONDS, cache)
        if outcome == "survived":
            outcome, failed = run_tests(checkout, Tests(of_folder), _LONGEST_SECONDS, cache)
    if failed and run_tests(checkout, Tests((failed,)), _LONGEST_SECONDS, cache)[0] != "survived":
        raise RuntimeError(f"{failed} fails without any mistake")
    return "" if outcome == "survived" else failed or outcome


def table(rows: list[dict]) -> str:
    """The Markdown table, and the survivors."""
    lines = ["| module | mutants | killed | timed out | survived |", "|---" * 5 + "|"]
    outcomes = ("killed", "timed out", "survived")

    def line(name, some):
        counts = [sum(row["outcome"] == one for row in some) for one in outcomes]
        return f"| {name} | {len(some)} | {' | '.join(map(str, counts))} |"

    modules = [name for name in MODULES if any(row["module"] == name for row in rows)]
    lines += [line(name, [row for row in rows if row["module"] == name]) for name in modules]
    sources = ((ROOT / "partime_mcmc" / name).read_text(encoding="utf-8") for name in MODULES)
    possible = sum(len(mutants(source)) for source in sources)
    lines += [
        line("**all**", rows),
        "",
        f"{len(rows)} of {possible:,} possible mistakes were drawn.",
        "",
    ]
    telling = [row for row in rows if key(row) not in EQUIVALENT]
    seen = [row for row in telling if row["outcome"] != "survived"]
    now = [row for row in telling if row["outcome"] != "survived" or row.get("noticed")]
    if telling:
        lines += [
            f"Of the {len(telling)} that change something promised the fast tests noticed {len(seen)} as drawn "
            f"({len(seen) / len(telling):.0%}); with the tests of the folders, and those written since, {len(now)}.",
            "",
        ]
    survivors = [row for row in rows if row["outcome"] == "survived"]
    if survivors:
        lines += ["| survivor | mistake | on inspection |", "|---|---|---|"]
    for row in survivors:
        if row.get("noticed"):
            said = f"noticed by `{row['noticed']}`"
        elif key(row) in EQUIVALENT:
            said = f"nothing that is promised changes: {EQUIVALENT[key(row)]}"
        else:
            said = "**not explained**"
        change = row["change"].replace("|", "\\|")
        lines.append(f"| {row['module']}:{row['line']} | `{change}` | {said} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a survivor is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="mutants per module")
    parser.add_argument("--only", default="", help="modules whose name has this in it")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin none after so many seconds")  # fmt: skip
    parser.add_argument("--programs", type=Path, help="folder of compiled programs, kept")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    stored = arguments.out / "mutations-cpu.json"
    record = {"seed": SEED, "seconds": {}, "rows": []}
    record |= json.loads(stored.read_text()) if stored.exists() else {}
    stored.parent.mkdir(parents=True, exist_ok=True)
    rows, seconds = record["rows"], record["seconds"]
    until = time.monotonic() + arguments.limit
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.programs or Path(folder)
        for row in tried(arguments.rounds, rows, seconds, until, arguments.only, cache):
            rows.append(row)
            print(
                " | ".join(
                    str(row[name]) for name in ("outcome", "module", "line", "change", "by")
                ),
                flush=True,
            )
            stored.write_text(json.dumps(record))
        for row in looked_at_again(rows, until, cache):
            rows[[key(one) for one in rows].index(key(row))] = row
            print(
                f"{row['module']}:{row['line']} | {row['change']} | {row['noticed'] or 'NOT noticed'}",
                flush=True,
            )
            stored.write_text(json.dumps(record))
    record.pop("about", None)
    keep(stored, record, table(rows))
    survivors = [row for row in rows if row["outcome"] == "survived" and not row.get("noticed")]
    return int(any(key(row) not in EQUIVALENT for row in survivors))


if __name__ == "__main__":
    sys.exit(main())
