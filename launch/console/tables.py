"""The look of every table that a command prints."""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from rich.table import Table

Cells = Literal["wrap", "fold", "cut"]
"""How a cell that is too wide is shown: broken between words, broken anywhere, or cut off."""


def table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    bold: bool = False,
    cells: Cells = "wrap",
) -> Table:
    """A table without lines, under its title.

    Columns are right-justified, for numbers, except at the positions in `left`, where a negative
    position counts from the end. If all headings are empty, the heading row is left out. A row may
    have fewer cells than there are columns.
    """
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold" if bold else None,
        box=None,
        show_header=any(headings),
        pad_edge=False,
    )
    aligned = {position % len(headings) for position in left}
    for position, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if position in aligned else "right"
        made.add_column(
            heading, justify=justify, overflow="fold" if cells == "fold" else "ellipsis", no_wrap=cells == "cut"
        )
    for row in rows:
        made.add_row(*row)
    return made
