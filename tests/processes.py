"""Programs in a Python of their own, for what a process does at its beginning or only once."""

import subprocess
import sys


def python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """What a new process printed; it inherits nothing but the search path.

    Args:
        code: The program.
        *flags: Of the interpreter.
        **environment: Variables of its own.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    inherited = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
    )
