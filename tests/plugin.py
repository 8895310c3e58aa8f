"""What pytest does here besides its own: which tests run, and the servers that many of them share.

    pytest          # not what needs more than running does: a cluster, a browser, clients, ...
    pytest --all    # everything; so it is, too, where CI is set

.pytest.ini names this file, because there is no conftest.py where pytest would look for one.
"""

import os
import signal

import pytest

from tests.servers import API, SHARED, shared

EVERYTHING = "pip install -r tests/requirements-all.txt && pytest --all"
LEFT_OUT = {
    "test_browser.py": "a browser",
    "test_clients.py": "other people's clients",
    "test_more_clients.py": "other people's clients",
    "test_windowed.py": "other people's clients",
    "test_deploy.py": "a cluster",
    "test_quantize.py": "quantised weights",
    "test_bench.py": "benchmarks",
    "test_gpu_bench.py": "benchmarks",
    "test_labs.py": "labs",
    "test_fuzz.py": "random requests",
    "test_hubs.py": "downloads",
    "test_devices.py": "networks on several devices",
    "test_faults.py": "faults",
    "test_strangers.py": "hostile requests",
    "test_cases.py": "other people's requests",
    "test_http.py": "other people's HTTP",
    "test_chatglm1.py": "the first ChatGLM",
    "test_packed.py": "quantised weights",
    "test_ptuning.py": "adapters",
    "test_lora.py": "adapters",
    "test_tiny.py": "held-out questions",
}

# In the background of a shell script Ctrl-C is ignored, and what the tests start would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", default="CI" in os.environ, help="leave out no tests"
    )


def is_left_out(name, config):
    """A file that is named on the command line runs."""
    named = any(name in argument for argument in config.args)
    return name in LEFT_OUT and not (config.option.all or named)


def pytest_ignore_collect(collection_path, config):
    return is_left_out(collection_path.name, config) or None


def pytest_unconfigure(config):
    """The last line of the output says what was left out."""
    kinds = dict.fromkeys(kind for name, kind in LEFT_OUT.items() if is_left_out(name, config))
    if kinds and not hasattr(config, "workerinput"):  # that is, not in each of xdist's processes
        print(f"Left out: {', '.join(kinds)}. To run everything: {EVERYTHING}")


@pytest.fixture(scope="module")
def server(request):
    """One at a time, with the flags a test asks for."""
    with shared(*API, *getattr(request, "param", ())) as server:
        yield server


@pytest.fixture
def url(server):
    return server.url


@pytest.fixture(autouse=True)
def a_failure_costs_no_neighbours(request):
    """What a test does to a server that others use as well is its own failure, not theirs."""
    failures = request.session.testsfailed
    yield
    for server in SHARED:
        if request.session.testsfailed > failures:
            server.restart()
        else:
            server.check()
