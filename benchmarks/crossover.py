"""Crossover points from measurements: from how many tokens one mixer costs less than another, and how its costs grow."""

import math
from collections.abc import Sequence
from typing import Any

Point = dict[str, Any]


def curve(points: Sequence[Point], mixer: str, name: str, quantity: str) -> dict[int, float]:
    """Tokens → quantity, for one mixer.

    name: of the pass, forward or training.   quantity: seconds or bytes.
    """
    return {p["tokens"]: p[quantity] for p in points if p["mixer"] == mixer and p["pass"] == name and p[quantity]}


def crossover(mine: dict[int, float], other: dict[int, float]) -> float | None:
    """The number of tokens from which ``mine`` stays below ``other``; 0 where it is below at all sizes.

    Interpolated linearly on logarithmic axes between two measured sizes; sizes that only one curve has are ignored. None
    where ``mine`` is not below at the largest size.
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
    """Factor by which a mixer's quantity grows between the two largest sizes of all mixers; None where one is missing."""
    sizes = sorted({p["tokens"] for p in points})[-2:]
    mine = curve(points, mixer, name, quantity)
    return mine[sizes[1]] / mine[sizes[0]] if len(sizes) == 2 and all(n in mine for n in sizes) else None


def sentence(points: Sequence[Point], mixer: str, against: str) -> str:
    """A sentence that states from how many tokens the mixer trains faster, and with less memory, than ``against``."""
    parts = []
    for quantity, better, worse in (
        ("seconds", "trains faster", "does not train faster"),
        ("bytes", "takes less memory", "does not take less memory"),
    ):
        mine, other = (curve(points, m, "training", quantity) for m in (mixer, against))
        sizes = sorted(mine.keys() & other.keys())
        if not sizes:
            parts.append(f"{better}: not measured")
            continue
        where, last = crossover(mine, other), sizes[-1]
        factor = f"{other[last] / mine[last]:.1f} times at {last:,}"
        if where is None:
            parts.append(f"{worse} at the largest size ({factor})")
        elif where == 0:
            parts.append(f"{better} from {sizes[0]:,} tokens or fewer ({factor})")
        else:
            parts.append(f"{better} from about {float(f'{where:.2g}'):,.0f} tokens ({factor})")
    return f"{mixer}, compared with {against} attention: {'; '.join(parts)}."
