"""Tables in a terminal, a file or a pipe, with rich where it is installed."""

from collections.abc import Sequence


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with its title; nothing when it has no rows."""
    if not rows:
        return
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    print(f"\n{title}\n")
    try:
        from rich import box, console
        from rich import table as rich_table
    except ImportError:
        # Aligned columns are enough: a machine where something is missing is where the doctor is needed.
        _plain(columns, cells)
        return
    output = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        output.add_column(column, overflow="fold")  # a narrow terminal breaks a word, and loses none
    for row in cells:
        output.add_row(*row)
    # No markup: the cells are text in which brackets are brackets. No highlighting: it would colour half a version.
    console.Console(markup=False, highlight=False).print(output)


def _plain(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
