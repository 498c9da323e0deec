"""The first Ctrl-C or SIGTERM of a run as a request to save and stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("isentropic")


@contextmanager
def stop_signals(trainer: Any) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request that all ranks see at their next reduction."""

    first = 0.0

    def request(number: int, frame: Any) -> None:
        nonlocal first
        if trainer._stop_requested:
            # A launcher passes its own Ctrl-C on: two signals at once are one request.
            if time.monotonic() - first > 2:
                raise KeyboardInterrupt
            return
        trainer._stop_requested, first = True, time.monotonic()
        logger.warning("will save and stop at the end of this generated batch; once more to stop now, without saving")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
