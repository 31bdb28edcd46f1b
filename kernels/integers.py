"""Division and rounding of integers, and division of rows into spans."""

from collections.abc import Iterator


def ceil_div(n: int, divisor: int) -> int:
    """Return n / divisor, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least n."""
    return ceil_div(n, multiple) * multiple


def equal_spans(n: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Yield spans of n rows, of at most `most` rows and of nearly equal sizes.

    multiple: the sizes of several spans, except the last, are rounded up to a multiple of it.
    """
    n_spans = ceil_div(n, most)
    size = ceil_div(n, max(1, n_spans))
    if n_spans > 1:
        size = round_up(size, multiple)
    for start in range(0, n, max(1, size)):
        yield slice(start, min(start + size, n))
