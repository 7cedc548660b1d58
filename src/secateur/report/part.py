"""What every part of a report is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class ReportPart(BaseModel):
    """Base of every part of a report: strict, frozen, without unknown keys and without NaN.

    The records of `secateur.types` carry no settings of their own, so these hold for them too, and a record that a
    stage made unchecked is checked here (``revalidate_instances``).
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        serialize_by_alias=True,
        revalidate_instances="always",
    )
