"""How hard the simulated cases are: frozen presets."""

from dataclasses import dataclass, fields

from lesionbench.errors import SuiteError


@dataclass(frozen=True)
class Difficulty:
    """What makes cases hard. Numbers are standard deviations unless said otherwise; intensities count in units of white matter.

    Attributes:
        deformation: displacement of the anatomy between subjects, mm (0: also no rotation and scaling).
        contrast: relative change of tissue intensities from case to case.
        site: relative change of tissue intensities from site to site.
        bias: logarithm of the bias field.
        noise: Rician noise.
        lesion_contrast: (low, high) factor on the difference between lesion and tissue, uniform.
        radius: (low, high) mm of the lesion (tumor, stroke, raters), uniform.
        irregularity: relative change of the radius with direction.
        mass_effect: share of the way to the lesion's center from which tissue was pushed outwards (0 to 0.5).
        caps: largest brightness of bright rims around the ventricles on T2 and FLAIR, uniform from 0.
        spots: largest number of small bright spots in white matter that are no lesions (in the variant `spots` they would be: none there).
        patches: largest number of large diffuse patches that are bright on FLAIR alone.
        patch_contrast: brightness of these patches.
    """

    deformation: float = 3.5
    contrast: float = 0.05
    site: float = 0.06
    bias: float = 0.08
    noise: float = 0.045
    lesion_contrast: tuple[float, float] = (0.75, 1.2)
    radius: tuple[float, float] = (14.0, 36.0)
    irregularity: float = 0.45
    mass_effect: float = 0.25
    caps: float = 0.8
    spots: int = 10
    patches: int = 2
    patch_contrast: float = 0.3

    def __post_init__(self) -> None:
        for part in fields(self):
            value, pair = getattr(self, part.name), part.type == tuple[float, float]
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
            if (
                len(numbers) != 1 + pair
                or not all(isinstance(n, int | float) and n >= 0 for n in numbers)
                or list(numbers) != sorted(numbers)
            ):
                wanted = "[low, high] with 0 <= low <= high" if pair else "a number of 0 or more"
                raise SuiteError(f"data.difficulty.{part.name}: {wanted}, got {value!r}")
            kind = int if part.type is int else float
            object.__setattr__(self, part.name, tuple(float(n) for n in numbers) if pair else kind(value))
        if self.radius[0] < 3 or self.radius[1] > 45 or self.mass_effect > 0.5:
            raise SuiteError(
                f"data.difficulty: radius within 3 to 45 mm and mass_effect at most 0.5; got {self.radius}, {self.mass_effect}"
            )


PRESETS = {  # frozen: every table names the preset, so a change here needs another GENERATOR
    "easy": Difficulty(2.5, 0.03, 0.03, 0.05, 0.03, (1.0, 1.2), (18.0, 36.0), 0.35, 0.2, 0.4, 4, 1, 0.2),
    "default": Difficulty(),
    "hard": Difficulty(4.5, 0.08, 0.1, 0.15, 0.09, (0.5, 1.0), (8.0, 36.0), 0.6, 0.3, 1.0, 20, 4, 0.4),
}
