"""What the tests of a running server share: one at a time, with the flags a test asks for."""

import signal

import pytest

from test_api import started, url  # noqa: F401  (a fixture, for the server below)

# In the background of a shell script Ctrl-C is ignored, and what the tests start would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def server(request):
    with started("api.py", *getattr(request, "param", ())) as server:
        yield server
