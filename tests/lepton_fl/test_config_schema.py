"""What `lepton config schema` and the generated reference say of every key."""

from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from lepton_fl.cli.schema import schema_of
from lepton_fl.config import roles


class Part(BaseModel):
    """A table."""

    size: int = 3  # of it


class Base(BaseModel):
    """Has a field that others inherit."""

    old: int = 0  # from before


class Whole(Base):
    """Every way to say what a key means."""

    beside: int = 1  # rows of ``x``
    # Stands above,
    # on two lines.
    above: int = 2
    both: int = 3  # and behind
    told: Annotated[int, Field(description="By itself.")] = 4  # not this
    some_name: int = 5  # beta_1; "x" means so
    part: Part | None = None  # inside
    parts: tuple[Part, ...] = ()


def test_what_a_key_means_stands_beside_it():
    schema = schema_of(Whole)
    words = {name: value.get("description") for name, value in schema["properties"].items()}
    assert words == {
        "old": "From before.",
        "beside": "Rows of `x`.",
        "above": "Stands above, on two lines.",
        "both": "And behind.",
        "told": "By itself.",
        "some_name": 'beta_1; "x" means so.',
        "part": "Inside.",
        "parts": None,
    }
    assert schema["$defs"]["Part"]["properties"]["size"]["description"] == "Of it."


def test_a_class_without_source_has_its_own_words():
    made = type("Made", (BaseModel,), {"__annotations__": {"x": int}, "x": Field(1, description="Told.")})
    assert schema_of(made)["properties"]["x"]["description"] == "Told."


@pytest.mark.parametrize("role", ["client", "server", "simulation"])
def test_every_key_of_every_role_is_described(role):
    """A key whose value is a table may leave it to the table."""
    schema = schema_of(roles()[role])
    tables = {"": schema, **schema["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, value in table.get("properties", {}).items()
        if not value.get("description") and "$ref" not in str(value)
    ]
    assert silent == []
