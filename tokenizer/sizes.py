"""Named extents of the tokenizer's transformers."""

from collections.abc import Iterable
from typing import NamedTuple, Self

from detok_pipe.latents.errors import ConfigError


class Size(NamedTuple):
    """Extent of one transformer."""

    width: int
    depth: int
    heads: int

    @classmethod
    def parse(cls, size: "str | Iterable[int]") -> Self:
        """A named size, "width,depth,heads", or three integers.

        Raises:
            ConfigError: unknown name, no three positive integers, or a width that does not
                split into heads of a multiple of 4 channels.
        """
        if isinstance(size, str) and size in SIZES:
            return cls(*SIZES[size])
        try:
            numbers = [int(part) for part in (size.split(",") if isinstance(size, str) else size)]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or min(numbers) < 1:
            raise ConfigError(
                f"transformer size {size!r} is unknown: choose one of {', '.join(SIZES)}, "
                "or give 'width,depth,heads'"
            )
        width, depth, heads = numbers
        if width % (4 * heads):
            raise ConfigError(
                f"transformer width {width} does not split into {heads} heads of a multiple of "
                f"4 channels: choose a multiple of {4 * heads}"
            )
        return cls(width, depth, heads)


SIZES = {
    "small": Size(512, 8, 8),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "xl": Size(1152, 28, 16),
}
