"""stub"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Store:
    path: Any
    chunk: int | None = None
    folds: Any = None
