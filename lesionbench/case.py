"""A case: the files of one scan session and what is known of the patient."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """One imaging session, as found on disk.

    `images` maps channel name to file; a channel that the data set lacks for this case is absent from the mapping (only
    accepted with `allow_missing`). `label` is one label map, `raters` one label map per rater. `attributes` holds plain values
    (`survival` in days, `event` 1 = died / 0 = censored, `grade`, `age`, class labels ...).
    """

    id: str
    images: dict[str, Path]
    label: Path | None = None
    raters: list[Path] = field(default_factory=list)
    patient: str = ""
    site: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.patient = self.patient or self.id

    @property
    def files(self) -> list[Path]:
        """Every file of the case, images first."""
        return [*self.images.values(), *([self.label] if self.label else []), *self.raters]
