"""From how many tokens on one mixer takes less than another, and how its costs grow, from measured points."""

import math
from collections.abc import Sequence
from typing import Any

Point = dict[str, Any]


def curve(points: Sequence[Point], mixer: str, name: str, quantity: str) -> dict[int, float]:
    """Tokens → the quantity, of one mixer in the pass of this name."""
    return {p["tokens"]: p[quantity] for p in points if p["mixer"] == mixer and p["pass"] == name and p[quantity]}


def crossover(mine: dict[int, float], other: dict[int, float]) -> float | None:
    """The number of tokens from which on ``mine`` stays below ``other``; None where it is not below at the largest size.

    Between two measured sizes it is where straight lines through them, on logarithmic axes, meet; 0 where it is below
    everywhere. Sizes that only one of the two has do not count.
    """
    sizes = sorted(mine.keys() & other.keys())
    ahead = [math.log(other[n] / mine[n]) for n in sizes]
    if not ahead or ahead[-1] <= 0:
        return None
    behind = [i for i, lead in enumerate(ahead) if lead <= 0]
    if not behind:
        return 0.0
    i = behind[-1]
    part = ahead[i] / (ahead[i] - ahead[i + 1])
    return sizes[i] * (sizes[i + 1] / sizes[i]) ** part


def growth(points: Sequence[Point], mixer: str, name: str, quantity: str) -> float | None:
    """Times by which the quantity grows between the two largest sizes that were measured of any mixer."""
    sizes = sorted({p["tokens"] for p in points})[-2:]
    mine = curve(points, mixer, name, quantity)
    return mine[sizes[1]] / mine[sizes[0]] if len(sizes) == 2 and all(n in mine for n in sizes) else None


def sentence(points: Sequence[Point], mixer: str, against: str) -> str:
    """From where on the mixer trains faster, and with less memory, than the other."""
    parts = []
    for quantity, better in (("seconds", "trains faster"), ("bytes", "takes less memory")):
        mine, other = (curve(points, m, "training", quantity) for m in (mixer, against))
        sizes = sorted(mine.keys() & other.keys())
        if not sizes:
            parts.append(f"{better}: not measured")
            continue
        where, last = crossover(mine, other), sizes[-1]
        times = f"{other[last] / mine[last]:.1f} times at {last:,}"
        if where is None:
            parts.append(f"never {better} up to {last:,} tokens ({times})")
        elif where == 0:
            parts.append(f"{better} from {sizes[0]:,} tokens or fewer ({times})")
        else:
            parts.append(f"{better} from about {float(f'{where:.2g}'):,.0f} tokens ({times})")
    return f"{mixer}, against {against} attention: {'; '.join(parts)}."
