"""Termination as an interrupt from the keyboard: a run that is asked to end keeps everything that is finished.

Batch systems, containers and shutdowns send SIGTERM and kill some seconds later. Python's own answer to it is to die at once;
here it is that to Ctrl-C, `KeyboardInterrupt`, which a run turns into the draws that are certified. A program that has
an answer of its own to SIGTERM keeps it, and so does JAX where it watches for preemption.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `KeyboardInterrupt` in the main thread. In other threads Python allows no handlers: nothing changes."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
