"""What a store keeps of its view rule: enough to make every view again, and to refuse another rule."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ViewIdentity:
    """What the teacher looked at: the rule that makes view v of sample i."""

    rule: str
    padding: int
    fill: str
    size: tuple[int, int]
    seed: int
