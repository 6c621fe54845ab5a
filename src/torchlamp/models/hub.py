"""Whether the Hugging Face hub can be reached: its clients would retry for minutes before they say that it can't."""

import os
import socket
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

_SECONDS = 5.0


def hub_address() -> str:
    """The hub's address: ``$HF_ENDPOINT``, else https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_resolves() -> bool:
    """Whether the hub's address can be looked up; taken as true where a proxy does the looking up."""
    proxies = getproxies()
    if "https" in proxies or "all" in proxies:
        return True
    try:
        socket.getaddrinfo(urlsplit(hub_address()).hostname, None)
    except OSError:
        return False
    return True


def hub_answers() -> bool:
    """Whether the hub answers a request at all, within a few seconds; an HTTP error counts as reachable."""
    if not hub_resolves():
        return False
    try:
        with urlopen(Request(hub_address(), method="HEAD"), timeout=_SECONDS):
            return True
    except HTTPError:
        return True
    except OSError:
        return False
