"""What the cache holds of a plan, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdxl_training.data.contact_sheet import printable
from sdxl_training.data.statistics import number_of
from sdxl_training.tracking.report_plan import Section

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the latent cache holds and lacks.

    bytes_when_full: with all latents, without compression. there: latents that are usable; None where that cannot be
    known, for the reason in `unknown`. to_encode: latents by the reason why they must be made. bytes_free: on the disk.
    text_bytes: the most that the text states of all captions take. text_bytes_there: what lies in their folder.
    """

    folder: str
    mode: str
    latents: int
    bytes_when_full: int
    bytes_free: int
    there: int | None = None
    to_encode: dict[str, int] = field(default_factory=dict)
    unknown: str = ""
    text_bytes: int = 0
    text_bytes_there: int = 0

    @property
    def counted(self) -> str:
        """Return how many latents are there, and how many must be made, and why."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.to_encode.items() if count)
        told = f" ({reasons})" if reasons else ""
        return f"{self.there or 0:,} there already, {sum(self.to_encode.values()):,} to encode{told}"

    @property
    def bytes_to_write(self) -> int:
        """Return about how much is still to be written, at most."""
        lacking = self.latents - (self.there or 0)
        latents = self.bytes_when_full * lacking // max(self.latents, 1)
        return latents + max(self.text_bytes - self.text_bytes_there, 0)


def cache_section(cache: CacheState | None) -> Section:
    """Return what plan and report say of the cache."""
    if cache is None:
        return Section("Latent cache", ["none: pictures are encoded at each visit (data.cache.mode = none)"])
    lines = [
        f"{printable(cache.folder)} (data.cache.mode = {cache.mode})",
        f"{number_of(cache.latents, 'latent')}, {_bytes(cache.bytes_when_full)} when full, without compression",
    ]
    if cache.there is None:
        lines.append(f"what is there already is not known: {cache.unknown}")
    else:
        lines.append(cache.counted)
    if cache.text_bytes:
        lines.append(
            f"text states: at most {_bytes(cache.text_bytes)}, were all captions different and as long as can be"
        )
    short = cache.bytes_to_write - cache.bytes_free
    lines.append(
        f"{_bytes(cache.bytes_free)} free on that disk"
        + (f": {_bytes(short)} too little for the {_bytes(cache.bytes_to_write)} to be written" if short > 0 else "")
    )
    return Section("Latent cache", lines)


def _bytes(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"
