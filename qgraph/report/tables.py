"""Tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the style of all commands."""
    listing = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        listing.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return listing


def row(listing: Table, *cells: object, style: str = "") -> None:
    """Add a row; names with brackets are no markup."""
    listing.add_row(*(Text(str(cell)) for cell in cells), style=style)
