"""Names of the cells of a board, a word for the row and one for the column, which share no letter."""

Cell = tuple[int, int]
ROWS, COLUMNS = "abcdefgh", "xyzwvuts"  # a line has one name on boards of all sizes


def row_names(size: int) -> str:
    return ROWS[:size]


def column_names(size: int) -> str:
    return COLUMNS[:size]


def cell_name(cell: Cell) -> str:
    """The name of a cell, such as `"b x"`: row, column."""
    return f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}"


def all_cells(size: int) -> list[Cell]:
    """The cells of a square board in raster order."""
    return [(row, column) for row in range(size) for column in range(size)]


def patch_of(cell: Cell, size: int) -> int:
    """The number of a cell in raster order: that of its patch, where a patch is as large as a cell."""
    return cell[0] * size + cell[1]


def cell_of(name: str) -> Cell:
    """The cell of a name."""
    row, column = name.split()
    return ROWS.index(row), COLUMNS.index(column)
