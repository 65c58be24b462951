"""What every section of the schema is built on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
SigmaData = Annotated[float, Field(ge=1e-3, le=1e3)]


class Section(BaseModel):
    """Settings are strict (no text for numbers), frozen and complete: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
