"""Weights known before training: frequent tags count less, rare ones more, each within its category.

No published formula exists for NovelAI's tag-based loss weighting (arXiv:2409.15997); this one is ours.

Shape legend: K tags, C categories.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import translate

import numpy as np
from numpy.typing import NDArray

from sdxl_training.records import UserError
from sdxl_training.weighting.tag_lists import Integers, Numbers

PLACE = "tag_weighting.static"
MANY = 50_000  # names; among more, only those of about the same length and with an end in common are looked at


@dataclass(frozen=True, slots=True)
class FrequencyRule:
    """Knobs of `log_weights`; see the configuration's section for what they mean."""

    strength: float = 0.5
    smoothing: float = 1.0
    max_factor: float = 3.0
    min_count: int = 5
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)


def frequency_log_weights(
    images_K: Numbers, category_K: Integers, strength: float, smoothing: float, max_factor: float
) -> Numbers:
    """Return S_k = clip(strength (r_c - ln(n_k + smoothing)), +-ln max_factor) of each tag.

    images_K: n_k, how many images of an epoch show the tag, each image once. category_K: number of each tag's category
    c. r_c = sum n_k ln(n_k + smoothing) / sum n_k over the category, so that before clipping the mean of S over all
    appearances in a category is 0, and no category can move another.
    """
    log_K = np.log(np.maximum(images_K + smoothing, np.finfo(np.float64).tiny))
    seen_C = np.bincount(category_K, images_K)
    reference_C = np.bincount(category_K, images_K * log_K) / np.maximum(seen_C, np.finfo(np.float64).tiny)
    limit = np.log(max_factor)
    return np.clip(strength * (reference_C[category_K] - log_K), -limit, limit)


def static_log_weights(
    names_K: Sequence[str], images_K: Numbers, pictures_K: Numbers, category_K: Integers, rule: FrequencyRule
) -> Numbers:
    """Return each tag's log weight: by frequency, with what the user says of single tags.

    pictures_K: how many pictures show the tag. Tags on fewer than min_count pictures, and those that do not matter,
    have 0. Raises one UserError for all names and patterns that no tag has.
    """
    problems: list[str] = []
    matters_K = _by_pattern(names_K, rule, problems)
    numbers = _find(names_K, rule.overrides, problems)
    if problems:
        raise UserError("\n".join(problems))
    images_K = np.where(matters_K, images_K, 0.0)  # what does not matter is no reference for others, either
    log_K = frequency_log_weights(images_K, category_K, rule.strength, rule.smoothing, rule.max_factor)
    log_K[~matters_K | (pictures_K < rule.min_count)] = 0.0
    for number, factor in zip(numbers, rule.overrides.values(), strict=True):
        log_K[number] = np.log(factor)
    return log_K


def tags_that_matter(names_K: Sequence[str], rule: FrequencyRule) -> NDArray[np.bool_]:
    """Return which tags a picture's static weight is made of: by include and exclude, and all that have an override."""
    problems: list[str] = []
    matters_K = _by_pattern(names_K, rule, problems)
    matters_K[_find(names_K, rule.overrides, problems)] = True
    return matters_K


def _by_pattern(names_K: Sequence[str], rule: FrequencyRule, problems: list[str]) -> NDArray[np.bool_]:
    matters_K = np.ones(len(names_K), bool)
    if rule.include:
        matters_K = _matching(names_K, rule.include, "include", problems)
    if rule.exclude:
        matters_K &= ~_matching(names_K, rule.exclude, "exclude", problems)
    return matters_K


def _matching(names_K: Sequence[str], patterns: Sequence[str], setting: str, problems: list[str]) -> NDArray[np.bool_]:
    matching_K = np.zeros(len(names_K), bool)
    for pattern in patterns:
        folded = pattern.lower()
        matches = re.compile(translate(folded)).match
        found_K = np.fromiter((name == folded or matches(name) is not None for name in names_K), bool, len(names_K))
        if not found_K.any():
            problems.append(f"{PLACE}.{setting}: {_absent(pattern, names_K)}")
        matching_K |= found_K
    return matching_K


def _find(names_K: Sequence[str], overrides: Mapping[str, float], problems: list[str]) -> list[int]:
    """Return the number of each tag."""
    wanted = {name.lower() for name in overrides}
    numbers = {name: number for number, name in enumerate(names_K) if name in wanted} if wanted else {}
    problems += [f"{PLACE}.overrides: {_absent(name, names_K)}" for name in overrides if name.lower() not in numbers]
    if len(wanted) < len(overrides):
        problems.append(f"{PLACE}.overrides: capital and small letters are the same tag, and one is there twice.")
    return [numbers.get(name.lower(), 0) for name in overrides]


def _absent(name: str, names_K: Sequence[str]) -> str:
    folded = name.lower()
    if len(names_K) > MANY:  # comparing letter by letter with a million names takes half a minute
        names_K = [other for other in names_K if _is_alike(folded, other)]
    close = get_close_matches(folded, names_K, n=1)
    hint = f"did you mean {close[0]}? Correct it" if close else "Correct it"
    return f"no picture has the tag {name}; {hint}, or delete it."


def _is_alike(name: str, other: str) -> bool:
    return abs(len(name) - len(other)) <= 2 and (name[:2] == other[:2] or name[-2:] == other[-2:])
