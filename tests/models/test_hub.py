import socket
import urllib.error

import pytest

from torchlamp.models import hub


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)


def test_an_unknown_address(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
    assert not hub.hub_resolves()
    assert not hub.hub_answers()


def test_a_proxy_looks_addresses_up(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.hub_resolves()
    assert not hub.hub_answers()  # nobody listens there


def test_a_port_where_nobody_listens(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert hub.hub_resolves()
        assert not hub.hub_answers()


def test_an_answer_that_says_no_is_an_answer(monkeypatch):
    def forbidden(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 403, "Forbidden", None, None)

    monkeypatch.setattr(hub, "hub_resolves", lambda: True)
    monkeypatch.setattr(hub, "urlopen", forbidden)
    assert hub.hub_answers()
