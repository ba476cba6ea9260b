"""Tables that read well in a terminal and are Markdown."""


def markdown(columns, rows):
    """Lines of a table; the first column to the left, others to the right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    rule = [":" + "-" * max(widths[0] - 1, 2), *("-" * max(width - 1, 2) + ":" for width in widths[1:])]
    return [_line(cells[0], widths), _line(rule, widths), *(_line(row, widths) for row in cells[1:])]


def _line(cells, widths):
    rest = zip(cells[1:], widths[1:], strict=True)
    padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in rest)]
    return "| " + " | ".join(padded) + " |"
