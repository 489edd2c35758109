"""From a picture to what a model takes."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Preprocessing:
    """Size (H, W), channels, mean and std (of [0, 1] pixels) of a model's input, and how pictures get that size."""

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: str = "bicubic"
    crop: float = 1.0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Preprocessing":
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
