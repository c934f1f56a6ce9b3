"""Progress: what a long run tells while it works.

A `Progress` is told of stages, steps and notes from the host, between compiled calls, so that switching it on changes
no draw and costs nothing inside a solve. `quiet` says nothing; `progress_line` keeps one line per stage on standard
error.
"""

import contextlib
import sys
import warnings
from typing import Callable, ContextManager, Iterator, Protocol

from tqdm import tqdm

from partime_mcmc.validation import check_has


class Progress(Protocol):
    """What a run tells."""

    def stage(self, name: str, total: int) -> ContextManager[Callable[..., None]]:
        """Begin a stage of `total` steps; yields `advance(steps, **shown)`."""
        ...

    def note(self, sentence: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, sentence: str) -> None:
        """Something that may make the result useless."""
        ...


class _Quiet:
    """Says nothing but warnings."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda steps, **shown: None

    def note(self, sentence: str) -> None:
        pass

    def warn(self, sentence: str) -> None:
        warnings.warn(sentence, stacklevel=3)


class _Line(_Quiet):
    """One line per stage on standard error."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        with tqdm(
            total=total,
            desc=f"{name:>16}",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            leave=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ) as bar:

            def advance(steps: int, **shown) -> None:
                if shown:
                    bar.set_postfix(shown, refresh=False)
                bar.update(steps)

            yield advance

    def note(self, sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)


quiet: Progress = _Quiet()
progress_line: Progress = _Line()


def chosen_progress(progress: Progress | bool | None) -> Progress:
    """The progress meant by `progress`: True is a line on a terminal and silence elsewhere, as users of NumPyro expect.

    Raises:
        TypeError: If it is neither a bool nor a Progress.
    """
    if progress is None or isinstance(progress, bool):
        return progress_line if progress and sys.stderr.isatty() else quiet
    check_has(
        progress, "progress", ("stage", "note", "warn"), "True, False, quiet or progress_line"
    )
    return progress
