"""Durations as people write them."""


def duration(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds.

    Args:
        seconds: not negative; parts of a second are dropped.

    Returns:
        ``M:SS``, or ``H:MM:SS`` from an hour on.

    Example:
        >>> duration(59), duration(3723)
        ('0:59', '1:02:03')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
