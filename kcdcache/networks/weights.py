"""Network weights on disk: read without running code, digested, loaded into a network, saved with a record."""

import hashlib
import io
import pickle
import pickletools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnfinishedError, UnsafeError
from kcdcache.files.atomic import naming, read_bytes, sha256_bytes, write_atomic
from kcdcache.files.records import Sealed, canonical_json, read_sealed, readable_json, sealed_json
from kcdcache.networks.input_transform import InputTransform

WRAPPERS = ("model", "state_dict")
"""keys of the weights in checkpoints of training scripts"""
REPLICA_PREFIX = "module."
"""added by DataParallel to every name"""
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


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors by name in a safetensors file, or in a torch file of tensors and plain values only.

    Checkpoints that wrap the weights (see `WRAPPERS`) or prefix their names are unwrapped.

    Raises:
        NotFoundError: there is no such file.
        UnsafeError: the file has Python objects, which could run code when loaded, or is no plain file.
        CorruptionError: the file is damaged or of another kind.
        MismatchError: it has something else than weights.
    """
    if not path.exists():
        raise NotFoundError(f"no weights file at {path}")
    parse = _parse_safetensors if path.suffix == ".safetensors" else _parse_torch
    with naming(path):
        data = read_bytes(path)
    return _unwrapped(parse(data, path), path)


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise MismatchError(f"{path} should hold tensors by name, it holds a {type(content).__name__}{keys}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise MismatchError(f"{path} should hold only tensors by name; '{name}' is a {type(value).__name__}")
    prefixed = all(name.startswith(REPLICA_PREFIX) for name in content)
    return {name.removeprefix(REPLICA_PREFIX) if prefixed else name: value for name, value in content.items()}


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


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a network; raises MismatchError unless names (but for batch counters) and shapes agree."""
    if reason := _difference(module, state):
        raise MismatchError(f"the weights in {where} do not fit {type(module).__name__}: {reason}")
    module.load_state_dict(state)


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
    reason = "" if refused else f": {type(error).__name__}: {str(error)[:200]}"
    return CorruptionError(f"{path} is not a whole torch file{reason}")


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
