"""How the rows of a field are stored: the encodings, with their arrays, both directions and error bounds."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int16
from torch import Tensor

from kcdcache.errors import NonFiniteError, SettingsError

HALF_MAX = 65504.0
NAMED_ROWS = 8
BLOCK_BYTES = 2**25
"""float32 values of a part that are encoded or decoded at once: those of many classes take gigabytes"""
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]*(:[a-z0-9]+(\.[a-z]+)?)*")
UNREADABLE = {"float32": np.nan, "float16": np.nan, "uint16": 0xFFFF, "uint8": 0xFF}
"""element type -> content of skipped samples' rows, which cannot be taken for real values"""

PLAIN: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float16": ("|stored - x| <= 2^-11 |x| + 2^-25; |x| above 65,504 is refused", Tensor.half, Tensor.float),
    "float32": ("exact", lambda x: x, Tensor.clone),
    "uint8": (
        "|stored - x| <= 1/510 for x in [0, 1], exact for whole 255ths; other numbers are refused",
        lambda x: (x * 255).round().to(torch.uint8),
        lambda y: y.float() / 255,
    ),
}
"""encodings that store each number by itself: name -> error bound, x -> stored, stored -> x"""
ENCODINGS = (*PLAIN, "top")

Stored = tuple[Tensor, ...]
Vector = Float32[Tensor, " batch"]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array a field is stored in."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    """numpy name of the element type"""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


class Fault(NamedTuple):
    """A reason why some rows of a field cannot be stored."""

    complaint: str
    rows: Tensor
    """mask (batch,) of the rows"""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The stored form of one field: its arrays, both directions, and the error bound."""

    name: str
    """as the user writes it, for example `top:16`"""
    field: str
    row_shape: tuple[int, ...]
    """of one sample's values, (classes,) for logits"""
    arrays: tuple[ArraySpec, ...]
    bound: str
    to_stored: Callable[[Tensor], Stored] = dataclasses.field(repr=False, compare=False)
    to_values: Callable[[Stored, float], Tensor] = dataclasses.field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled as the words that `parse` takes: its functions have no names."""
        return parse, (self.name, self.field, self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all arrays."""
        return sum(spec.row_bytes for spec in self.arrays)

    def faults(self, values: Float32[Tensor, "batch ..."]) -> list[Fault]:
        """Return the reasons why rows cannot be stored, each with a mask of its rows, often empty."""
        found = [Fault(f"field '{self.field}' is not finite", _any(~torch.isfinite(values)))]
        if self.name == "float16" and self.field != "logits":
            beyond = _any(torch.isfinite(values) & (values.abs() > HALF_MAX))
            complaint = f"field '{self.field}' exceeds float16's {HALF_MAX:.0f}"
            found.append(Fault(complaint, beyond, "; `--encoding float32` can hold it"))
        if self.name == "uint8":
            found.append(Fault(f"field '{self.field}' is not in [0, 1]", _any((values < 0) | (values > 1))))
        return found

    def encode(
        self, values: Float32[Tensor, "batch ..."], first: int = 0, skipped: Bool[Tensor, " batch"] | None = None
    ) -> dict[str, np.ndarray]:
        """Return array name -> stored rows (batch, ...); `first` is the sample index of row 0, for messages.

        Rows in the mask `skipped` may hold anything; they are stored as NaN, or 0xFFFF in packed arrays. Raises
        NonFiniteError if a value is NaN, infinite or too large for the stored form, SettingsError for an unplanned
        shape.
        """
        if tuple(values.shape[1:]) != self.row_shape:
            raise SettingsError(
                f"rows of field '{self.field}' should have shape {self.row_shape}, found {tuple(values.shape[1:])}"
            )
        if skipped is not None:
            values = values.masked_fill(skipped.view(-1, *[1] * len(self.row_shape)), 0.0)
        for fault in self.faults(values):
            if wrong := fault.rows.nonzero().flatten().tolist():
                named = name_some([first + row for row in wrong])
                raise NonFiniteError(f"{fault.complaint} for samples {named} (rows counted from {first}){fault.remedy}")
        stored: dict[str, np.ndarray] = {}
        for spec, tensor in zip(self.arrays, self.to_stored(values), strict=True):
            stored[spec.name] = rows = tensor.cpu().numpy().view(spec.dtype)
            if skipped is not None:
                rows[skipped.cpu().numpy()] = UNREADABLE[spec.dtype]
        return stored

    def decode(self, stored: Mapping[str, Tensor], temperature: float = 1.0) -> Float32[Tensor, "batch ..."]:
        """Return the values of stored rows, as a new tensor on their device.

        For logits, softmax(result / temperature) is the teacher's softened output within `bound`; only `top:K` depends
        on the temperature. `stored` may hold arrays of other fields too. Raises SettingsError unless the temperature is
        positive.
        """
        if not 0 < temperature < math.inf:
            raise SettingsError(f"temperature should be a positive number, found {temperature}")
        return self.to_values(tuple(stored[spec.name] for spec in self.arrays), temperature)


def parse(text: str, field: str, row_shape: tuple[int, ...]) -> Encoding:
    """Return the encoding that the user named, for one field; raises SettingsError if it is unknown or does not fit.

    >>> parse("top:16", "logits", (1000,)).arrays[0].row_shape
    (35,)
    """
    if not FIELD_NAME.fullmatch(field) or not row_shape or not all(type(n) is int and n > 0 for n in row_shape):
        raise SettingsError(f"field {field!r} with rows of shape {row_shape} cannot be stored")
    name, _, argument = text.partition(":")
    if name not in ENCODINGS:
        raise SettingsError(
            f"unknown encoding {text!r} for '{field}'; known: float16, float32, uint8 (numbers in [0, 1]), "
            "top:K (logits only)"
        )
    if field == "logits" and len(row_shape) != 1:
        raise SettingsError(f"encoding {name} needs logits of shape (classes,), found {row_shape}")
    if name == "top":
        if field != "logits":
            raise SettingsError(f"encoding top:K is for logits only, not for '{field}'; use float16 or float32")
        return _top(row_shape[0], argument)
    if argument:
        raise SettingsError(f"encoding {name} takes no argument, found '{text}'")
    return _gaps(row_shape) if (name, field) == ("float16", "logits") else _plain(name, field, row_shape)


def statistics(values: Float32[Tensor, "batch ..."]) -> dict[str, int | float]:
    """Return count, minimum and maximum of the finite values, and non_finite for the log."""
    count, finite = values.numel(), values[torch.isfinite(values)]
    low, high = map(float, torch.aminmax(finite)) if len(finite) else (0.0, 0.0)
    return {"count": count, "minimum": low, "maximum": high, "non_finite": count - len(finite)}


def merged(one: Mapping[str, int | float], other: Mapping[str, int | float]) -> dict[str, int | float]:
    """Return the `statistics` of two sets of values together."""
    finite = [each for each in (one, other) if each["count"] > each["non_finite"]] or [one]
    return {
        "count": one["count"] + other["count"],
        "minimum": min(each["minimum"] for each in finite),
        "maximum": max(each["maximum"] for each in finite),
        "non_finite": one["non_finite"] + other["non_finite"],
    }


def blocks(rows: int, row_shape: Sequence[int], share: int = 1) -> Iterator[slice]:
    """Yield slices of consecutive rows whose float32 values take at most BLOCK_BYTES / `share`, or one row."""
    step = max(1, BLOCK_BYTES // (4 * share * math.prod(row_shape)))
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def name_some(samples: Sequence[int]) -> str:
    """List the first few sample indices, and how many more there are.

    >>> name_some(range(3, 13))
    '3, 4, 5, 6, 7, 8, 9, 10 and 2 more'
    """
    more = f" and {len(samples) - NAMED_ROWS} more" if len(samples) > NAMED_ROWS else ""
    return ", ".join(map(str, samples[:NAMED_ROWS])) + more


def _any(wrong: Tensor) -> Tensor:
    return wrong.flatten(1).any(1)


def _plain(name: str, field: str, row_shape: tuple[int, ...]) -> Encoding:
    """Return an encoding with one array of the field's own shape and of type `name`."""
    bound, to_stored, to_values = PLAIN[name]
    arrays = (ArraySpec(field.replace(":", "-"), row_shape, name),)  # a folder's name too
    return Encoding(
        name,
        field,
        row_shape,
        arrays,
        bound,
        lambda values: (to_stored(values),),
        lambda stored, _: to_values(stored[0]),
    )


def _gaps(row_shape: tuple[int, ...]) -> Encoding:
    """Return the encoding of logits as float16 gaps to their row's maximum."""
    return Encoding(
        name="float16",
        field="logits",
        row_shape=row_shape,
        arrays=(ArraySpec("logits", row_shape, "float16"), ArraySpec("logits_rowmax", (), "float32")),
        bound=(
            "with gap = rowmax - z, clipped at 65,504: |stored gap - gap| <= 2^-11 gap + 2^-25, so that "
            "KL(p||q) <= 2^-23 E_p[g^2 exp(g/2048)] with g = gap/T (from KL <= E_p[e^d - 1 - d]); typically below "
            "1e-6. Adding rowmax back in float32 rounds z once more, by at most 2^-24 |z|"
        ),
        to_stored=_encode_gaps,
        to_values=lambda stored, temperature: stored[0].float().add_(stored[1][:, None]),
    )


def _encode_gaps(z: Float32[Tensor, "batch classes"]) -> Stored:
    rowmax = z.amax(dim=1)
    return (z - rowmax[:, None]).clamp(min=-HALF_MAX).half(), rowmax


def _top(classes: int, argument: str) -> Encoding:
    kept = int(argument) if argument.isdecimal() else 0
    if not 1 <= kept <= classes <= 2**16:
        raise SettingsError(
            f"encoding top:K needs 1 <= K <= classes <= 65536; found 'top:{argument}', {classes} classes"
        )
    return Encoding(
        name=f"top:{kept}",
        field="logits",
        row_shape=(classes,),
        arrays=(ArraySpec("logits", (2 * kept + 3,), "uint16"),),
        bound=(
            f"the {kept} largest logits keep their gap to the maximum within 2^-11 gap + 2^-25 (clipped at 65,504); "
            "the row maximum itself is not kept; the other classes share their mass uniformly: its logarithm is kept "
            "within 2^-11 of itself at T = 1, at other T it lies between bounds that also hold the true one"
        ),
        to_stored=lambda z: _encode_top(z, kept),
        to_values=lambda stored, temperature: _decode_top(stored[0], kept, classes, temperature),
    )


def _encode_top(z: Float32[Tensor, "batch classes"], kept: int) -> Stored:
    ordered = z.sort(dim=1, descending=True, stable=True)  # stable: equal logits stay in class order
    gaps = (ordered.values - ordered.values[:, :1]).clamp(min=-HALF_MAX)
    numbers = torch.cat([gaps[:, :kept], _tail_moments(gaps[:, kept:])], dim=1).half()
    return (torch.cat([ordered.indices[:, :kept].to(torch.int16), numbers.view(torch.int16)], dim=1),)


def _tail_moments(tail: Float32[Tensor, "batch tail"]) -> Float32[Tensor, "batch 3"]:
    """Return log sum exp, mean and variance of the tail's gaps, clamped to float16's range; zeros without a tail."""
    if not tail.shape[1]:
        return tail.new_zeros(len(tail), 3)
    moments = torch.stack([tail.logsumexp(dim=1), tail.mean(dim=1), tail.var(dim=1, correction=0)], dim=1)
    return moments.clamp(-HALF_MAX, HALF_MAX)


def _decode_top(packed: Tensor, kept: int, classes: int, temperature: float) -> Float32[Tensor, "batch classes"]:
    bits: Int16[Tensor, "batch packed"] = packed.view(torch.int16)  # torch knows few operations on uint16
    ids = bits[:, :kept].long() & 0xFFFF
    numbers = bits[:, kept:].view(torch.float16).float()
    tail = torch.zeros_like(numbers[:, 0])
    if classes > kept:
        largest, log_sum, mean, variance = numbers[:, kept - 1 :].unbind(1)
        log_mean = log_sum - math.log(classes - kept)
        tail = temperature * _tail_log_mean(1 / temperature, log_mean, mean, variance, largest)
    return tail[:, None].repeat(1, classes).scatter_(1, ids, numbers[:, :kept])


def _tail_log_mean(t: float, log_mean: Vector, mean: Vector, variance: Vector, largest: Vector) -> Vector:
    """Return K(t) = log mean exp(t x) over a row's tail of gaps x, all at most `largest` <= 0, for t = 1/T > 0.

    K(t) is its cumulant expansion mean t + variance t^2 / 2 + c t^3 with c such that K(1) = `log_mean` exactly, held
    within what convexity, K(0) = 0, K'(0) = mean and K' <= largest allow; the true K(t) lies there too.
    """
    cubic = log_mean - mean - variance / 2
    expansion = mean * t + variance * t**2 / 2 + cubic * t**3
    chord = t * log_mean
    if t <= 1:
        return expansion.maximum(mean * t).minimum(torch.minimum(largest * t, chord))
    return expansion.maximum(chord).minimum((log_mean + (t - 1) * largest).maximum(chord))
