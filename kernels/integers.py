"""Division and rounding of integers."""


def ceil_div(n: int, divisor: int) -> int:
    """Return n / divisor, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least n."""
    return ceil_div(n, multiple) * multiple
