"""Decides which samples go to which device: pure functions of (labels, seed).

There are two splits, as the field uses them:

- `iid`: a random permutation cut into equal parts.
- `dirichlet`: label skew of concentration `alpha`; small is skewed, large tends to iid.
  - Without `per_device` (Yurochkin et al. 2019; Li et al. 2022, "Federated Learning on Non-IID Data
    Silos"): for each class c, p_c ~ Dir(alpha * 1_K) over the K devices, and the samples of c are
    cut in these proportions. Every sample is used; sizes differ between devices. The draw is
    repeated until every device has at least `min_samples`.
  - With `per_device` (Hsu, Qi, Brown 2019, arXiv 1909.06335): for each device, a mixture
    q ~ Dir(alpha * C * prior) over the C classes, and `per_device` labels drawn from q without
    replacement; a class that runs out leaves its share to the others. Hsu et al. write
    Dir(a * prior), so their a is C * alpha. Here alpha means the same in both cases, namely what
    "Dirichlet 0.5" means in most papers.

Randomness comes from `numpy.random.RandomState`, because NEP 19 froze its stream, with the
distributions: a seed gives the same split under every numpy.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wire.errors import DataError

Split = Literal["iid", "dirichlet"]
Indices = NDArray[np.int64]

MIN_SAMPLES = 10
MAX_TRIES = 1000
MIN_ALPHA = 0.01  # far below it, all gamma variates of a draw underflow to 0


def partition(
    y: NDArray[np.int64],
    devices: int,
    *,
    split: Split = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    per_device: int | None = None,
    min_samples: int = MIN_SAMPLES,
) -> list[Indices]:
    """Deal the samples out to the devices.

    Args:
        y: labels, (N,) integers from 0.
        devices: how many, K.
        split: see the module's docstring.
        alpha: concentration of the Dirichlet; `iid` ignores it.
        seed: 0 to 2^32 - 1.
        per_device: samples for each device; None deals out all N.
        min_samples: the least a device may get (`dirichlet` without `per_device`).

    Returns:
        K disjoint arrays of indices into `y`, each in random order.

    Raises:
        DataError: too few samples, alpha or seed out of range, or no draw gave every device
            `min_samples`.
    """
    if devices < 1 or (per_device is not None and per_device < 1):
        raise DataError(
            f"expected at least 1 device with at least 1 sample, got {devices} devices"
            f"{'' if per_device is None else f' with {per_device} samples each'}"
        )
    wanted = devices * (1 if per_device is None else per_device)
    if wanted > len(y):
        raise DataError(
            f"{devices} devices need {wanted} samples, the training set has {len(y)}; ask for "
            + (
                f"at most {len(y)} devices"
                if devices > len(y)
                else f"fewer devices, or at most {len(y) // devices} samples each"
            )
        )
    if split not in get_args(Split):
        raise DataError(f"split: expected 'iid' or 'dirichlet', got {split!r}")
    rng = random(seed)
    if split == "iid":
        order = rng.permutation(len(y))
        if per_device is None:
            return np.array_split(order, devices)
        return np.split(order[:wanted], devices)
    if not MIN_ALPHA <= alpha < np.inf:
        raise DataError(
            f"expected a finite alpha of at least {MIN_ALPHA}, got {alpha}; 0.5 is usual"
        )
    if per_device is not None:
        return _mixtures(y, devices, per_device, alpha, rng)
    return _proportions(y, devices, alpha, min_samples, rng)


def stratified(
    y: NDArray[np.int64], fraction: float, *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut every class in the same proportion; return the rest's indices, then the fraction's.

    Raises:
        DataError: the seed is out of range.
    """
    rng = random(seed)
    rest, chosen = [], []
    for pool in _pools(y, rng):
        cut = round(len(pool) * fraction)
        chosen.append(pool[:cut])
        rest.append(pool[cut:])
    return rng.permutation(np.concatenate(rest)), rng.permutation(np.concatenate(chosen))


def random(seed: int) -> np.random.RandomState:
    """The random numbers of a seed.

    Raises:
        DataError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 32:
        raise DataError(f"expected a seed from 0 to {(1 << 32) - 1}, got {seed}")
    return np.random.RandomState(seed)


def _pools(y: NDArray[np.int64], rng: np.random.RandomState) -> list[Indices]:
    """The indices of each class 0..C-1, shuffled."""
    return [rng.permutation(np.flatnonzero(y == c)) for c in range(int(y.max()) + 1)]


def _proportions(
    y: NDArray[np.int64], devices: int, alpha: float, min_samples: int, rng: np.random.RandomState
) -> list[Indices]:
    pools = _pools(y, rng)
    sizes = np.array([len(pool) for pool in pools])
    best = 0
    for _ in range(MAX_TRIES):
        shares = rng.dirichlet(np.full(devices, alpha), len(pools))  # (C, K)
        cuts = np.rint(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
        cuts[:, -1] = sizes
        counts = np.diff(cuts, axis=1, prepend=0)
        best = max(best, int(counts.sum(axis=0).min()))
        if counts.sum(axis=0).min() < min_samples:
            continue
        parts = [np.split(pool, cut[:-1]) for pool, cut in zip(pools, cuts, strict=True)]
        return [
            rng.permutation(np.concatenate([part[k] for part in parts])) for k in range(devices)
        ]
    raise DataError(
        f"{MAX_TRIES} draws of Dirichlet({alpha:g}) over {devices} devices: expected at least "
        f"{min_samples} samples on each device, got {best} on the poorest at best; raise alpha, "
        "use fewer devices, or give each the same number of samples (--per-device)"
    )


def _mixtures(
    y: NDArray[np.int64], devices: int, per_device: int, alpha: float, rng: np.random.RandomState
) -> list[Indices]:
    pools = _pools(y, rng)
    remaining = np.array([len(pool) for pool in pools])
    present = remaining > 0
    concentration = alpha * present.sum() * remaining[present] / remaining.sum()
    devices_indices = []
    for _ in range(devices):
        mixture = np.zeros(len(pools))
        mixture[present] = rng.dirichlet(concentration)
        counts = _draw(mixture, remaining, per_device, rng)
        drawn = [pool[n - k : n] for pool, n, k in zip(pools, remaining, counts, strict=True)]
        remaining = remaining - counts
        devices_indices.append(rng.permutation(np.concatenate(drawn)))
    return devices_indices


def _draw(
    mixture: NDArray[np.float64],
    remaining: NDArray[np.int64],
    total: int,
    rng: np.random.RandomState,
) -> NDArray[np.int64]:
    """How many of each class: `total` draws from `mixture`, but no more than `remaining`."""
    counts = np.zeros(len(remaining), np.int64)
    while (missing := total - int(counts.sum())) > 0:
        open_ = remaining > counts
        weights = np.where(open_, mixture, 0.0)
        if not weights.sum() > 1e-12:  # the mixture's classes are used up (or it underflowed)
            weights = (remaining - counts).astype(np.float64)
        more = rng.multinomial(missing, weights / weights.sum())
        counts += np.minimum(more, remaining - counts)
    return counts
