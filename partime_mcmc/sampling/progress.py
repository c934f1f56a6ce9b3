"""Progress: what a long run tells while it works.

A `Progress` is told of stages, steps and notes from the host, between compiled calls, so that switching it on changes
no draw and costs nothing inside a solve. `quiet` says nothing; `progress_line` keeps one line per stage on standard
error, on which it says that programs are being compiled until the stage's first steps are done.
"""

import contextlib
import sys
import threading
import warnings
from typing import Callable, ContextManager, Iterator, Protocol

from tqdm import tqdm

from partime_mcmc.validation import check_has

_TICK_SECONDS = 0.5


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
            compiled = threading.Event()

            def advance(steps: int, **shown) -> None:
                if steps > 0:
                    compiled.set()
                if compiled.is_set():
                    bar.set_postfix(shown, refresh=False)
                bar.update(steps)

            with _ticking(bar, compiled):
                yield advance

    def note(self, sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)


@contextlib.contextmanager
def _ticking(bar: tqdm, done: threading.Event) -> Iterator[None]:
    """Until the first steps are done show that programs are being compiled, and the seconds as they pass."""

    def tick():
        while not done.wait(_TICK_SECONDS):
            bar.refresh()

    bar.set_postfix_str("compiling")
    thread = threading.Thread(target=tick, name="partime_mcmc ticks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
