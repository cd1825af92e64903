"""Start training from the weights of another run (trainer.init_from)."""

import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.errors import ConfigError, naming, permission_errors
from vix.layers.tokens import TokenGrid, join
from vix.system.files import user_path

Weights = Mapping[str, Tensor]
# Tables of positions, which a model may lack, or have in another size: see vix/layers/posenc.py and vix/attention/window.py.
TOKEN_TABLE, OFFSET_TABLE, PREFIX_TABLE = "table_ND", "table_HYX", "prefix_table_H3"


def weights_file(source: str) -> Path:
    """The file of weights at ``source``, a run's directory or a file. Raises ConfigError where there is none."""
    with naming("trainer.init_from"), permission_errors(ConfigError):
        path = user_path(source)
        path = path / "checkpoint.pt" if path.is_dir() else path
        found = path.is_file()
    if not found:
        raise ConfigError(f"trainer.init_from={source}: there is no {path}; pass a run's directory, or a file of weights")
    return path


def read_weights(source: str) -> Weights:
    """The last weights of a run, or those of a file, on the CPU.

    source: a run's directory, a checkpoint.pt, or a file with a model's state dict.

    Raises ConfigError where there is no such file, or it contains something else. Code in it is never executed.
    """
    path = weights_file(source)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        raise ConfigError(f"trainer.init_from={source}: {path} is damaged, or not a file of weights") from error
    weights = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ConfigError(f"trainer.init_from={source}: {path} contains no weights of a model")
    return weights


def weights_digest(source: str) -> str:
    """Digest of the weights at ``source``: twelve hexadecimal digits that depend only on their names and values.

    Raises ConfigError as :func:`read_weights`.
    """
    path = weights_file(source)
    status = path.stat()
    return digest_of_file(source, str(path.absolute()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def digest_of_file(source: str, path: str, size: int, changed: int) -> str:
    """:func:`weights_digest`, computed once for each state of a file."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(read_weights(source).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="surrogateescape"))
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def init_identity(source: str | None) -> dict[str, str]:
    """The field of results.json that identifies the weights from which a run starts.

    source: ``trainer.init_from``.

    Empty where a run starts from none, or where they cannot be read, as a resumed run does not need them.
    """
    try:
        return {"init_weights": weights_digest(source)} if source else {}
    except ConfigError:
        return {}


def fit_weights(model: nn.Module, source: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The weights at ``source`` that a model takes, in its shapes; and messages about what was changed and what was left out.

    model: the model, which is not changed; it may be on the meta device.
    source: ``trainer.init_from``; None: no weights.

    A head for another number of classes stays as it is. Position tables are interpolated where the number of tokens differs,
    and stay as they are where the weights lack them.

    Raises ConfigError where the weights cannot be read, or differ from the model's in anything else.
    """
    if source is None:
        return {}, []
    weights, own = read_weights(source), model.state_dict()
    prefix = int("class_token" in own)
    taken: dict[str, Tensor] = {}
    resized, wrong = [], []
    for name, tensor in weights.items():
        fitted = resize(name, tensor, own[name].shape, prefix) if name in own else None
        if fitted is not None:
            taken[name] = fitted
            if fitted is not tensor:
                resized.append(f"{name} from {shown(tensor)} to {shown(fitted)}")
        elif not may_differ(name, tensor, own.get(name)):
            wrong.append(f"{name} is {shown(tensor)} there and {shown(own[name])} here" if name in own else f"it has {name}")
    new = [name for name in own if name not in taken]
    wrong += [f"it has no {name}" for name in new if name not in weights and not is_position_table(name)]
    if wrong:
        more = f", and {len(wrong) - 1} more differences" if len(wrong) > 1 else ""
        raise ConfigError(
            f"trainer.init_from={source}: its weights are not those of this model ({wrong[0]}{more}); "
            "use its options of model, attention and embedding"
        )
    left = [f"{name} ({shown(weights[name])})" for name in weights if name not in taken]
    parts = {"Interpolated": resized, "Not taken": left, "Newly initialized": new}
    listed = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
    return taken, [f"Starting from the weights of {source}", *listed]


def shown(tensor: Tensor) -> str:
    """The shape of a tensor, such as 10×64."""
    return "×".join(map(str, tensor.shape)) or "a number"


def is_position_table(name: str) -> bool:
    """Whether a parameter is a table of positions."""
    return name.rpartition(".")[2] in (TOKEN_TABLE, OFFSET_TABLE, PREFIX_TABLE)


def may_differ(name: str, tensor: Tensor, own: Tensor | None) -> bool:
    """Whether weights that do not fit are left out: a position table that the model lacks, or a head for other classes.

    name, tensor: of the weights.
    own: the model's tensor of that name; None where it lacks one.
    """
    if own is None:
        return is_position_table(name)
    return name in ("head.weight", "head.bias") and tensor.shape[1:] == own.shape[1:]


def resize(name: str, tensor: Tensor, shape: torch.Size, prefix: int) -> Tensor | None:
    """A tensor in the shape that the model needs; None where it does not fit.

    name: of the tensor, by which position tables are recognized. Their maps are interpolated with bicubic polynomials.
    tensor: of the weights; returned as it is where it has the shape.
    shape: the shape of the model's tensor.
    prefix: number of rows of a token table before those of the map, which are kept.
    """
    if tensor.shape == shape:
        return tensor
    kind = name.rpartition(".")[2]
    if kind == TOKEN_TABLE and tensor.shape[1:] == shape[1:]:
        here, there = (math.isqrt(max(0, rows - prefix)) for rows in (shape[0], tensor.shape[0]))
        if (here**2, there**2) != (shape[0] - prefix, tensor.shape[0] - prefix):
            return None
        prefix_1PD, map_1DYX = TokenGrid(there, there, prefix).split(tensor.float()[None])
        # Where the map becomes smaller, every position counts, not only those near the new ones.
        map_1DYX = F.interpolate(map_1DYX, (here, here), mode="bicubic", antialias=here < there)
        return join(prefix_1PD, map_1DYX)[0].to(tensor.dtype)
    if kind == OFFSET_TABLE and tensor.shape[:1] == shape[:1]:
        # The first and last entries stay those of the smallest and the largest distance.
        table = F.interpolate(tensor.float()[None], tuple(shape[1:]), mode="bicubic", align_corners=True)
        return table[0].to(tensor.dtype)
    return None
