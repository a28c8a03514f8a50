"""Network weights on disk: read without running code, digested, loaded into a network, saved with a record."""

import hashlib
import io
import logging
import pickle
import pickletools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from kcdcache.errors import (
    CorruptionError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnfinishedError,
    UnsafeError,
    nearest,
)
from kcdcache.files.atomic import naming, read_bytes, sha256_bytes, write_atomic
from kcdcache.files.records import Sealed, canonical_json, read_sealed, readable_json, sealed_json
from kcdcache.networks.catalogue import NETWORKS
from kcdcache.networks.input_transform import InputTransform

logger = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]
USUAL = ("", "model", "state_dict", "model.state_dict")
"""places of the weights in checkpoints of training scripts, the first that is there; "" is the checkpoint itself"""
DEEPEST = 3
"""levels of a checkpoint that are searched for weights"""
PREFIXES = ("module.", "model.", "student.", "_orig_mod.")
"""before every name in checkpoints of DataParallel, Lightning, distillation scripts and torch.compile"""
AVERAGE_COUNT = "n_averaged"
"""beside the weights of torch's AveragedModel"""
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""before the names of second classifiers that inception and googlenet have in training only"""
MOST_LISTED = 8
"""keys of a checkpoint in a message"""
MOST_HEADER_BYTES = 4 * 2**20
"""of a safetensors header, which takes many times that once parsed; 10,000 tensors need 1 MB"""


class NetworkRecord(Sealed):
    """The record saved with a network's weights; further entries are JSON values such as its accuracy."""

    model_config = ConfigDict(extra="allow")

    architecture: str
    classes: tuple[str, ...]
    """names in label order"""
    channels: int
    transform: InputTransform
    weights_sha256: str = ""
    """of the file of weights, set by `save_network`"""


def load_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors by name in a safetensors file, or in a torch file of tensors and plain values only.

    Of a checkpoint that holds several networks' weights, such as raw and averaged ones, those at `key` are taken: keys
    joined by dots, or the beginning of names. Without one, those at the usual place (see `USUAL`), with a warning.

    Raises:
        NotFoundError: there is no such file.
        UnsafeError: the file has Python objects, which could run code when loaded, or is no plain file.
        CorruptionError: the file is damaged or of another kind.
        MismatchError: it has something else than weights, or several at no usual place.
        SettingsError: it has no weights at `key`.
    """
    if not path.exists():
        raise NotFoundError(f"no weights file at {path}")
    parse = _parse_safetensors if path.suffix == ".safetensors" else _parse_torch
    with naming(path):
        data = read_bytes(path)
    return _chosen(parse(data, path), path, key)


def _chosen(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """Return the weights at `key`, or else those at the usual place; say which others there are."""
    found = dict(_weights_in(content))
    if not found:
        raise _no_weights(content, path)
    if key is not None:
        return _asked(found, key, path)
    most = max(map(len, found.values()))
    rivals = [place for place, weights in found.items() if 2 * len(weights) >= most]  # else statistics or the like
    place = next((usual for usual in USUAL if usual in rivals), rivals[0] if len(rivals) == 1 else None)
    if place is None:
        raise MismatchError(
            f"{path} holds the weights of {len(rivals)} networks, at {_listed(rivals)}; name those of the teacher, for "
            f"example --weights-key {rivals[-1]}"
        )
    if others := [rival for rival in rivals if rival != place]:
        logger.warning(
            "weights: %s holds the weights of %d networks; those at '%s' are taken; others (%s) with --weights-key %s",
            path, len(rivals), place, _listed(others), others[0]
        )  # fmt: skip
    elif place not in USUAL:
        logger.info("weights: %s holds weights at '%s' only, which are taken", path, place)
    return dict(found[place])


def _weights_in(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Weights]]:
    """Yield the place of every dictionary of tensors by name, and the dictionary."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        yield place, content
    elif depth < DEEPEST:
        for name, value in content.items():
            if isinstance(name, str):
                yield from _weights_in(value, f"{place}.{name}" if place else name, depth + 1)


def _asked(found: Mapping[str, Weights], key: str, path: Path) -> dict[str, Tensor]:
    if key in found:
        return dict(found[key])
    for place, weights in found.items():
        prefix = f"{key.removeprefix(f'{place}.')}." if place else f"{key}."
        if inside := {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}:
            return inside
    known = [place for place in found if place] or sorted({name.partition(".")[0] for name in found.get("", ())})
    hint = nearest(key, known) if len(known) < 20 else ""
    raise SettingsError(
        f"--weights-key {key}: {path} holds no weights there, but at {_listed(known)}; {hint}".rstrip("; ")
    )


def _listed(places: Sequence[str]) -> str:
    """List some keys.

    >>> _listed(["model", "model_ema"])
    "'model', 'model_ema'"
    """
    more = f" and {len(places) - MOST_LISTED} more" if len(places) > MOST_LISTED else ""
    return (", ".join(f"'{place:.80}'" for place in places[:MOST_LISTED]) or "no place") + more


def _no_weights(content: Any, path: Path) -> MismatchError:
    """Return the error for a checkpoint without any dictionary of tensors by name."""
    for key in USUAL[1:3]:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        return MismatchError(f"{path} should hold tensors by name, it holds a {type(content).__name__}{keys}")
    name, value = next(
        (name, value) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    )
    return MismatchError(f"{path} should hold only tensors by name; '{name!s:.80}' is a {type(value).__name__}")


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of all tensors, in any order and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        header = canonical_json([name, str(tensor.dtype), list(tensor.shape)])
        # with its length, so that a header cannot be confused with the previous tensor's bytes
        digest.update(len(header).to_bytes(8, "little") + header)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_into(module: nn.Module, state: Weights, where: str) -> None:
    """Copy weights into a network; raises MismatchError unless names (but for batch counters) and shapes agree.

    What training adds to the names or beside the weights is left out and said, see `PREFIXES` and `AUXILIARY`. Weights
    of another code base, whose names differ but whose kinds and shapes are the same in the same order, are taken, with
    a warning.
    """
    fitted = _fitted(module, state, where)
    if reason := _difference(module, fitted):
        renamed = _in_our_order(module, fitted)
        if renamed is None:
            reason = _other_classes(module, fitted) or f"{reason}{_fitting(fitted) if 'another' in reason else ''}"
            raise MismatchError(f"the weights in {where} do not fit {type(module).__name__}: {reason}")
        logger.warning("weights: %s has the names of another code base: %s", where, _renaming(renamed, fitted))
        fitted = renamed
    module.load_state_dict(fitted)


def _fitting(state: Weights) -> str:
    """Return which network of `NETWORKS` weights fit by kinds, shapes and order, by any names, for a message."""
    body = _body(state)
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            if body and _body(make(1, _channels(state)).state_dict()) == body:
                return f"; they fit '{name}'"
    return ""


def _body(state: Weights) -> list[tuple[str, tuple[int, ...]]]:
    """Return the signature without the classifier, which is the last layer."""
    return [*_signature(state)][:-2]


def _other_classes(module: nn.Module, state: Weights) -> str | None:
    """Return that weights are for another number of classes, if that is all, by shapes and order, or else None."""
    own = module.state_dict()
    if not (body := _body(own)) or body != _body(state):
        return None
    theirs, ours = (max(weights[_counted_out(weights)[-1]].shape[:1], default=0) for weights in (state, own))
    return f"they are for {theirs} classes, the network here has {ours}" if theirs != ours else None


def _channels(state: Weights) -> int:
    """Return the channels of the first convolution, 3 if there is none."""
    return next((int(value.shape[1]) for value in state.values() if value.ndim == 4), 3)


def _signature(state: Weights) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield kind (`weight`, `bias`, `running_mean`, ...) and shape of each tensor in order, but for batch counters."""
    for name in _counted_out(state):
        yield name.rpartition(".")[2], tuple(state[name].shape)


def _counted_out(state: Weights) -> list[str]:
    return [name for name in state if not name.endswith("num_batches_tracked")]


def _in_our_order(module: nn.Module, state: Weights) -> dict[str, Tensor] | None:
    """Return weights by the network's own names if they have its kinds and shapes in its order, or else None."""
    own = module.state_dict()
    if [*_signature(own)] != [*_signature(state)]:
        return None
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    return counters | {ours: state[theirs] for ours, theirs in zip(_counted_out(own), _counted_out(state), strict=True)}


def _renaming(renamed: Weights, state: Weights) -> str:
    """Return the first tensor whose name changed, in words."""
    pairs = zip(_counted_out(renamed), _counted_out(state), strict=True)
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return (
        f"kinds and shapes agree in their order, so '{theirs}' is taken as '{ours}', and so on; `kcdcache evaluate` "
        "shows whether its accuracy is the published one"
    )


def _fitted(module: nn.Module, state: Weights, where: str) -> Weights:
    """Return the weights by the names that the network has for them; log what was changed."""
    own, found, said = module.state_dict(), dict(state), list[str]()
    if AVERAGE_COUNT not in own and found.pop(AVERAGE_COUNT, None) is not None:
        said.append(f"they are an average, whose counter '{AVERAGE_COUNT}' is left out")
    while prefix := next((one for one in PREFIXES if _only_theirs(one, found, own)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        said.append(f"'{prefix}' before every name is left out")
    if extra := [name for name in found if name.startswith(AUXILIARY) and name not in own]:
        found = {name: value for name, value in found.items() if name not in extra}
        heads = ", ".join(sorted({name.partition(".")[0] for name in extra}))
        said.append(f"{len(extra)} tensors of second classifiers, which serve training only, are left out ({heads})")
        if type(module).__module__.startswith("torchvision."):
            said.append("torchvision's own weights of it expect --teacher-mean 0.5,0.5,0.5 --teacher-std 0.5,0.5,0.5")
    if said:
        logger.info("weights: %s: %s", where, "; ".join(said))
    return found


def _only_theirs(prefix: str, found: Weights, own: Weights) -> bool:
    """Return whether all names that were found begin with a prefix, and not all names of the network."""
    theirs, ours = (all(name.startswith(prefix) for name in names) for names in (found, own))
    return bool(found) and theirs and not ours


def save_network(folder: Path, name: str, module: nn.Module, record: NetworkRecord) -> None:
    """Write a network as `<name>.safetensors`, then its record with that file's SHA-256 as `<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    # cloned, because safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    data = safetensors.torch.save(tensors)
    write_atomic(folder / f"{name}.safetensors", data)
    document = record.document() | {"weights_sha256": sha256_bytes(data)}
    write_atomic(folder / f"{name}.json", sealed_json(document, readable_json))


def load_network(path: Path, name: str = "model") -> tuple[NetworkRecord, dict[str, Tensor]]:
    """Return the record and weights written by `save_network`, from the folder or the path of the JSON file.

    Raises:
        NotFoundError: there is no such network.
        UnfinishedError: there are only weights, as saving was interrupted.
        CorruptionError: the record was changed or is incomplete, or the weights are not those of the record.
    """
    record = path if path.suffix == ".json" else path / f"{name}.json"
    weights = record.with_suffix(".safetensors")
    if not record.exists() and weights.exists():
        raise UnfinishedError(f"{weights} has no {record.name} beside it: run the command that makes it again")
    found = read_sealed(record, NetworkRecord, readable_json)
    if not weights.exists():
        raise CorruptionError(f"{record} describes {weights.name}, which is not there")
    with naming(weights):
        data = read_bytes(weights)
    if sha256_bytes(data) != found.weights_sha256:
        raise CorruptionError(f"{weights} is damaged or was replaced: its SHA-256 is not the one in {record.name}")
    return found, _parse_safetensors(data, weights)


def _parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    if (length := int.from_bytes(data[:8], "little")) > MOST_HEADER_BYTES:
        raise CorruptionError(f"{path} should be a safetensors file: its header claims {length} bytes")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptionError(f"{path} should be a safetensors file: {error}") from None


def _parse_torch(data: bytes, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # torch warns of unknown pickle protocols
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise any kind of error
        raise _refusal(data, path, error) from None


def _refusal(data: bytes, path: Path, error: Exception) -> Exception:
    refused = isinstance(error, pickle.UnpicklingError)
    if "TorchScript" in str(error) or (refused and (data[:2] == b"PK" or _is_pickle(data))):
        return UnsafeError(
            f"{path} holds Python objects besides tensors and plain values; loading it could run any code, so it is "
            "refused. If you trust where it is from, convert it elsewhere: load it with torch, save its state dict "
            "with safetensors.torch.save_file, and give the .safetensors file here"
        )
    # torch's message for refused files advises to switch the protection off
    reason = "" if refused or isinstance(error, KeyError) else f": {str(error)[:200]}"
    return CorruptionError(f"{path} is not a whole torch file{reason}; give weights that torch or safetensors saved")


def _is_pickle(data: bytes) -> bool:
    try:
        return sum(1 for _ in pickletools.genops(data)) > 0
    except Exception:  # as above; genops only lists steps
        return False


def _difference(module: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """Return how weights differ from a network's, or None."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    shaped = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    linear = [path for path, inner in module.named_modules() if isinstance(inner, nn.Linear)]
    if shaped and not missing and not unexpected and linear:
        weight = f"{linear[-1]}.weight"
        theirs, ours = (tuple(side[weight].shape)[:1] for side in (found, expected))
        if theirs and theirs != ours and all(name.startswith(f"{linear[-1]}.") for name in shaped):
            return f"they are for {theirs[0]} classes, the network here has {ours[0]}"
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, first '{missing[0]}'")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected, first '{unexpected[0]}'")
    if shaped:
        sides = f"{list(expected[shaped[0]].shape)} expected, {list(found[shaped[0]].shape)} found"
        parts.append(f"{len(shaped)} have another shape, first '{shaped[0]}': {sides}")
    return "; ".join(["another architecture", *parts]) if parts else None
