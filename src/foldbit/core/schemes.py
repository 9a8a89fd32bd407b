"""What a scheme is, how it is spelled, and the planes it takes.

A scheme says how a tensor becomes a sum of scaled sign planes, x ≈ v1·s1 + … + vk·sk:

=========  ======  ========  ===============================================================================
name       planes  foldable  scales
=========  ======  ========  ===============================================================================
``fp``     0       yes       none: the tensor stays float
``ls-1``   1       yes       least squares, 1 bit: v = mean|x|
``ls-2``   2       yes       least squares, 2 bits: the global optimum over all v1 ≥ v2 ≥ 0
``ls-T``   2       yes       least squares, ternary: v1 = v2, values −2v, 0, 2v
``gf-k``   k       yes       greedy, k = 1…8 bits: each plane fits what the earlier ones left
``ls-k``   k       no        least squares, k = 3 or 4 bits, over all signs; the best a search finds
``lsf-k``  k       yes       least squares, k = 3 or 4 bits, over peeled signs; the best a search finds
``alt-k``  k       no        alternating, k = 2…4 bits (Xu et al. 2018): a baseline
``rg-k``   k       no        refined greedy, k = 2…4 bits (Guo et al. 2017): a baseline
=========  ======  ========  ===============================================================================

The planes of a foldable scheme are peeled: each is the sign of what the earlier ones left
(:func:`foldbit.fold`). Those of the others are the code of the nearest of all 2^k levels ±v1 ± … ± vk
(:func:`foldbit.encode`); they are for weights only, which are encoded once, whereas the kernels peel
activations as they come.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    Attributes:
        name: its spelling, as in the table above.
        planes: sign planes, hence bits, per value; 0 for ``fp``.
        foldable: whether its planes are peeled; else they are those of the nearest level.
    """

    name: str
    planes: int
    foldable: bool = True

    @property
    def is_float(self) -> bool:
        """Whether the tensor is left as it is."""
        return self.planes == 0

    def __str__(self) -> str:
        return self.name


MAX_PLANES = 8
FLOAT = Scheme("fp", 0)

_SCHEMES = {
    scheme.name: scheme
    for scheme in (
        FLOAT,
        Scheme("ls-1", 1),
        Scheme("ls-2", 2),
        Scheme("ls-T", 2),
        *(Scheme(f"gf-{k}", k) for k in range(1, MAX_PLANES + 1)),
        *(Scheme(f"ls-{k}", k, foldable=False) for k in (3, 4)),
        *(Scheme(f"lsf-{k}", k) for k in (3, 4)),
        *(Scheme(f"{kind}-{k}", k, foldable=False) for kind in ("alt", "rg") for k in (2, 3, 4)),
    )
}


def names() -> tuple[str, ...]:
    """Every scheme's spelling."""
    return tuple(_SCHEMES)


def parse(scheme: str | Scheme) -> Scheme:
    """The scheme of a name; a :class:`Scheme` passes through.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything but a string or a scheme.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"a scheme is a name such as 'ls-2', got {type(scheme).__name__}: {scheme!r}")
    if scheme not in _SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known are {', '.join(_SCHEMES)}")
    return _SCHEMES[scheme]
