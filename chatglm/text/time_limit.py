"""A limit on the time of code that nobody here wrote, such as a checkpoint's chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block once it has taken so long.

    Python raises it between two steps of its own code: one long call into C goes on to its end.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over, is_sent, has_come = threading.Lock(), False, False, False

    def send() -> None:
        nonlocal is_sent
        with lock:
            if not is_over:
                is_sent = True
                set_async_exception(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, send)
    timer.daemon = True
    with lock:  # it is to strike in the block, not in the middle of its own start
        timer.start()
    try:
        yield
    # GeneratorExit: it has come between the block and here, and passed by this function.
    except (TimeoutError, GeneratorExit):
        has_come = True
        raise
    finally:
        with lock:
            is_over = True
        timer.cancel()
        while is_sent and not has_come:  # it is on its way, and must not arrive behind the block
            time.sleep(0.001)
