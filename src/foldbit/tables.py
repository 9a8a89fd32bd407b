"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, rule_before: int | None = None) -> str:
    """Columns under their headers, the first flush left, the others flush right.

    Args:
        header: one title a column; a line break in one makes the header taller.
        rows: as many cells each.
        rule_before: the index of the row that a rule goes before, as before totals.
    """
    titles = [title.split("\n") for title in header]
    height = max(map(len, titles))
    lines = [[*[""] * (height - len(title)), *title] for title in titles]
    head = [[column[i] for column in lines] for i in range(height)]
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    printed = [*map(line, head), rule]
    for i, row in enumerate(body):
        printed += [rule, line(row)] if i == rule_before else [line(row)]
    return "\n".join(printed)


def nbytes(count: int) -> str:
    """A number of bytes, for people: 1,024 bytes are a KiB."""
    if count < 1024:
        return f"{count} B"
    size, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
