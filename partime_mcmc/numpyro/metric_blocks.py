"""Metrics by blocks of sites, as NumPyro has them.

NumPyro's mass matrices are dicts: a tuple of site names maps to the block `(d, d)`, or its diagonal `(d,)`, of those sites'
coordinates in the order of the tuple, and between blocks the matrix is 0. With one root R per block,

    inverse_mass_matrix = R Rᵀ,    mass_matrix_sqrt = S with S Sᵀ = (R Rᵀ)⁻¹,    mass_matrix_sqrt_inv = S⁻¹,    S lower triangular.

Positions that are no dicts have one array for all coordinates instead, in the order of `ravel_pytree`.
"""

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.kernels.metric_root import LowRank, Root, is_diagonal, metric_of
from partime_mcmc.types import AnyArray, Array, PyTree

Names = tuple[str, ...]


def site_names(names: Any) -> Names:
    """The names of a block; one name alone is a block of one site."""
    return (names,) if isinstance(names, str) else tuple(names)


def blocks_of(dense_mass: Any, inverse_mass_matrix: Any) -> dict[Names, bool]:
    """The blocks that a user has named, and whether each is dense.

    Args:
        dense_mass: None, a bool, or a list of tuples of site names.
        inverse_mass_matrix: None, an array, or blocks by tuples of site names.

    Raises:
        ValueError: If `dense_mass` is nothing of the kind, or a site is in two blocks.
    """
    if not isinstance(dense_mass, bool | np.bool_ | list | tuple | None):
        raise ValueError(
            f"dense_mass: got {dense_mass!r}, wanted a bool or a list of tuples of site names"
        )
    listed = dense_mass if isinstance(dense_mass, list | tuple) else ()
    blocks = dict.fromkeys(map(site_names, listed), True)
    if isinstance(inverse_mass_matrix, dict):
        blocks = {names: block.ndim == 2 for names, block in inverse_mass_matrix.items()} | blocks
    names = [name for block in blocks for name in block]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"dense_mass, inverse_mass_matrix: got site {twice[0]!r} in two blocks, wanted it in one"
        )
    return blocks


def coordinates_of(names: Names, position: Any) -> np.ndarray:
    """Where the numbers of some sites are in a flattened position.

    Args:
        names: The sites, in this order.
        position: A dict by site, or its shapes.

    Raises:
        ValueError: If a site is not in the position.
    """
    if not isinstance(position, Mapping):
        raise ValueError(
            f"dense_mass, inverse_mass_matrix: got blocks of sites {list(names)} for a position that is no dict"
        )
    begin, where = 0, {}
    for name in sorted(position):
        size = sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(position[name]))
        where[name] = np.arange(begin, begin + size)
        begin += size
    missing = [name for name in names if name not in where]
    if missing:
        raise ValueError(
            f"dense_mass, inverse_mass_matrix: got a block of site {missing[0]!r}, wanted some of {sorted(where)}"
        )
    return np.concatenate([where[name] for name in names])


def dimension_of(position: PyTree) -> int:
    """How many numbers a position has, or one of these shapes."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(position))


def metric_of_blocks(blocks: Mapping[Names, np.ndarray], position: Any) -> np.ndarray:
    """The metric whose blocks were given, the identity elsewhere; variances `(D,)` if all blocks are.

    Args:
        blocks: By tuples of site names, `(d,)` or `(d, d)`.
        position: A position, or its shapes.

    Raises:
        ValueError: If a block has another number of coordinates than its sites.
    """
    metric = np.eye(dimension_of(position))
    for names, block in blocks.items():
        where = coordinates_of(names, position)
        if block.shape[0] != where.size:
            raise ValueError(
                f"inverse_mass_matrix[{names!r}]: shape {block.shape}, wanted ({where.size},) or ({where.size}, "
                f"{where.size}): these sites have {where.size} unconstrained numbers"
            )
        metric[np.ix_(where, where)] = block if block.ndim == 2 else np.diag(block)
    return metric if any(block.ndim == 2 for block in blocks.values()) else np.diag(metric).copy()


def root_by_block(
    root: Root, blocks: Mapping[Names, bool], position: PyTree
) -> dict[Names, Root] | Root:
    """The root of a metric by block; as it came if positions are no dicts of sites.

    Args:
        root: Standard deviations `(D,)`, lower triangular `(D, D)`, or, without blocks of a user's, `LowRank`.
        blocks: The blocks that a user has named, and whether each is dense; the other sites are one more.
        position: A position.
    """
    if not isinstance(position, Mapping) or not all(isinstance(name, str) for name in position):
        return root
    if not blocks:
        return {tuple(sorted(position)): root}
    rest = tuple(sorted(set(position) - {name for names in blocks for name in names}))
    found = {}
    for names, is_dense in {**blocks, **({rest: False} if rest else {})}.items():
        where = coordinates_of(names, position)
        if is_dense:
            found[names] = root[np.ix_(where, where)] if root.ndim == 2 else np.diag(root[where])
        else:
            found[names] = (root if root.ndim == 1 else root.diagonal())[where]
    return found


def whole_root(roots: Mapping[Names, Root] | Root, position: PyTree) -> Root:
    """The root `(D,)` or `(D, D)` from `root_by_block`; works on traced values.

    Args:
        roots: By block.
        position: A position.
    """
    if not isinstance(roots, Mapping):
        return roots
    if tuple(sorted(position)) in roots:
        return roots[tuple(sorted(position))]
    # Where each coordinate of the position is among those of all blocks in a row.
    places = np.argsort(np.concatenate([coordinates_of(names, position) for names in roots]))
    if all(root.ndim == 1 for root in roots.values()):
        return jnp.concatenate(list(roots.values()))[places]
    matrices = [root if root.ndim == 2 else jnp.diag(root) for root in roots.values()]
    return jax.scipy.linalg.block_diag(*matrices)[np.ix_(places, places)]


def each_block(function: Callable[[Any], AnyArray], roots: Any, num_axes: int) -> Any:
    """A function of one matrix, or of one diagonal, of every block of every chain.

    Args:
        function: Of `(d,)`, `(d, d)` or a `LowRank`.
        roots: By block, or one root, with `num_axes` axes in front.
        num_axes: Axes of chains.
    """
    for _ in range(num_axes):
        function = jax.vmap(function)
    return jax.tree.map(function, roots, is_leaf=lambda node: isinstance(node, LowRank))


def mass_sqrt(root: Root) -> Array:
    """S."""
    if is_diagonal(root):
        return 1 / root
    return jnp.linalg.cholesky(jnp.linalg.inv(metric_of(root)))


def mass_sqrt_inv(root: Root) -> AnyArray:
    """S⁻¹."""
    if is_diagonal(root):
        return root
    return jnp.linalg.inv(mass_sqrt(root))
