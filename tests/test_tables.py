"""Plain text tables."""

import pytest

from foldbit.tables import nbytes, table


def test_columns_align_under_headers_of_several_lines():
    text = table(
        ["layer", "1-bit\nparams"], [["conv", "1,024"], ["classifier", 7], ["total", "1,031"]], rule_before=2
    )
    assert text.splitlines() == [
        "             1-bit",
        "layer       params",
        "------------------",
        "conv         1,024",
        "classifier       7",
        "------------------",
        "total        1,031",
    ]


def test_no_rows_and_one_column():
    assert table(["a"], []) == "a\n-"
    assert table(["a", "bc"], [["x", ""]]) == "a  bc\n-----\nx"


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["x"]])


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2, "1.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (5000 * 1024**3, "5000.0 GiB"),
    ],
)
def test_bytes_for_people(count, text):
    assert nbytes(count) == text
