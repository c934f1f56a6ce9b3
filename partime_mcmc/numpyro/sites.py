"""What a trace of a NumPyro model says of its sites: which are worth reporting, and what their axes are called.

A trace is a dict from site names to dicts; nothing here needs NumPyro itself.
"""

import numpy as np


def reported(sites: dict) -> tuple[str, ...]:
    """Names of the latent and deterministic sites of a trace, in its order."""
    latent = {
        name for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]
    }
    return tuple(
        name for name, site in sites.items() if name in latent or site["type"] == "deterministic"
    )


def plate_dims(sites: dict, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Axis names, by site, for those of `names` whose axes are exactly their plates."""
    dims = {}
    for name in names:
        frames = sorted(sites[name].get("cond_indep_stack", ()), key=lambda frame: frame.dim)
        if frames and len(frames) == np.ndim(sites[name]["value"]):
            dims[name] = tuple(frame.name for frame in frames)
    return dims
