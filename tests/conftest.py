"""What the tests of a running server share: one at a time, with the flags a test asks for."""

import pytest

from test_api import started, url  # noqa: F401  (a fixture, for the server below)


@pytest.fixture(scope="module")
def server(request):
    with started("api.py", *getattr(request, "param", ())) as server:
        yield server
