import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.errors import printable
from kcdcache.report.load import Loaded
from kcdcache.report.tables import SHOWN, Column, Table, every, shown


def table(rows, kind="number"):
    columns = (Column("name", "the name"), Column("value", "value (s)", kind))
    return Table(key="t", title="T", note="how to read", columns=columns, rows=rows)


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_csv_and_json_hold_unrounded_numbers(number):
    made = table([{"name": "a", "value": number}])
    assert float(read(made.csv())[0]["value"]) == number
    assert made.document()["rows"] == [{"name": "a", "value": number}]


@settings(max_examples=20)
@given(st.text())
def test_a_text_is_one_printable_line_wherever_it_is_shown(text):
    made = table([{"name": text, "value": None}])
    cell = made.cells()[0][0]
    assert cell.isprintable()
    assert cell == printable(text)
    assert len(made.text().split("\n")) == 3
    assert "\u202e" not in made.text()
    assert read(made.csv())[0]["name"].removeprefix("'") == printable(text).removeprefix("'")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "=cmd|' /C calc'!A0"])
def test_no_text_is_a_formula_in_a_spreadsheet(text):
    assert read(table([{"name": text, "value": -1.5}]).csv()) == [{"name": f"'{text}", "value": "-1.5"}]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", 0.99537, "99.54"), ("signed", 0.1, "+0.100"), ("share", 0.8664, "0.866"),
        ("count", 25866.0, "25,866"), ("number", 0.0000012345, "1.234e-06"), ("seconds", 1234.56, "1,234.6"),
        ("text", 3, "3"), ("count", None, ""), ("percent", "many", "many"),
    ],
)  # fmt: skip
def test_how_numbers_are_shown(kind, value, text):
    assert shown(value, kind) == text


def test_text_for_a_terminal_is_aligned():
    made = table([{"name": "long name", "value": 1.5}, {"name": "b"}])
    assert made.text() == f"the name   value (s)\n{'-' * 20}\nlong name        1.5\nb"


def test_every_column_is_shown_in_a_way_there_is_and_has_a_name_of_its_own():
    for made in every(Loaded((), (), (), ())).values():
        assert {column.kind for column in made.columns} <= set(SHOWN)
        assert len({column.name for column in made.columns}) == len(made.columns)
