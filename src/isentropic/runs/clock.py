"""Durations as people write them."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(59), duration(3723)
        ('0:59', '1:02:03')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
