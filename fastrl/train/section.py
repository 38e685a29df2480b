"""What every section of a recipe has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings that cannot be changed or misspelt."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
