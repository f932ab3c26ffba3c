"""When victims count as attacked: what their means over seeds must show, by group of attack."""

from __future__ import annotations

from dataclasses import dataclass, field

from attacks.base import GateGroup
from victims.keys import LATER


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What victims must show: mean ASR as a share; its lift over the clean victim and the accuracy
    lost, which are differences of shares."""

    asr: float
    lift: float
    clean_loss: float

    def __post_init__(self) -> None:
        if not 0 <= self.asr <= 1:
            raise ValueError(f"asr is a share in 0..1, got {self.asr}")
        for name in ("lift", "clean_loss"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a difference in -1..1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What victims must show whose attack stamps nothing: ``low`` bounds the Wilson interval of
    their success, pictures of all seeds together, from below, ``clean`` the success on the clean
    victims from above."""

    low: float
    clean: float
    clean_loss: float

    def __post_init__(self) -> None:
        for name in ("low", "clean", "clean_loss"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """When the victims of an attack count as attacked: all seeds together, by their means.
    ``rate`` is where they are judged; None, the largest of the attack.

    ``init_loss`` is the clean accuracy a victim may lose against the weights it started from,
    ``reference`` the accuracy that these must have before any victim is trained.
    """

    rate: str | None = None
    reference: float | None = field(default=None, metadata=LATER)
    strong: Thresholds = Thresholds(asr=0.90, lift=0.80, clean_loss=0.02)
    medium: Thresholds = Thresholds(asr=0.80, lift=0.70, clean_loss=0.02)
    weak: Thresholds = Thresholds(asr=0.50, lift=0.45, clean_loss=0.02)
    targeted: Planted = Planted(low=0.30, clean=0.0, clean_loss=0.02)
    # A clean model, too, ranks some picture first: twice the share of one class among twenty.
    text: Planted = Planted(low=0.30, clean=0.10, clean_loss=0.02)
    inert_lift: float = 0.20
    init_loss: float = 0.03

    def __post_init__(self) -> None:
        if self.reference is not None and not 0 <= self.reference <= 1:
            raise ValueError(f"reference is a share in 0..1, got {self.reference}")
        for name in ("inert_lift", "init_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in 0..1, got {getattr(self, name)}")

    def thresholds(self, group: GateGroup) -> Thresholds | Planted:
        by_group: dict[GateGroup, Thresholds | Planted] = {
            GateGroup.STRONG: self.strong,
            GateGroup.MEDIUM: self.medium,
            GateGroup.WEAK: self.weak,
            GateGroup.TARGETED: self.targeted,
            GateGroup.TEXT: self.text,
        }
        return by_group[group]
