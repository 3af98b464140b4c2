"""Which addresses of the web a crawl may open: http and https on public machines, and nothing else.

A link from a search page is a stranger's word. It may lead to this machine, to its neighbours or to a cloud's metadata
service, in many spellings, and a name may mean another machine each time it is asked for. So a link is taken apart
here, once, and what is opened is the address that was checked (server-side request forgery: OWASP, CWE-918).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote, urlsplit

from minisd.errors import NetworkError

Resolve = Callable[[str], Sequence[str]]

_PORTS = {"http": 80, "https": 443}
_LONGEST_URL = 4096
_BRACKETS = re.compile(r"\[([0-9a-fA-F:.]+)\](?::[0-9]*)?")
_NAME = re.compile(r"(?:[a-z0-9_][a-z0-9_-]{0,62}\.)*[a-z0-9_][a-z0-9_-]{0,62}")
# Whose last label is a number: some libraries read these as one 32-bit address, with octal and hexadecimal parts
# (URL standard, "ends in a number"); a name of the web never is one.
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
# Written differently by IDNA 2003, which Python has, and IDNA 2008, which browsers have: sharp s, final sigma, joiners.
_DEVIATIONS = re.compile("[\u00df\u1e9e\u03c2\u200c\u200d]")
# What may stand in a path or a query as it is (RFC 3986); "%" because an escape stays one.
_SAFE = "%/:@!$&'()*+,;=-._~"

# The registries of special addresses (RFC 6890) as of 2025: `is_global` of older Pythons does not know them all.
_SPECIAL_V4 = [
    IPv4Network("168.63.129.16/32"),  # Azure's own services, metadata among them
    IPv4Network("192.0.0.0/24"),  # 192.0.0.192 is Oracle Cloud's metadata
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
]
_UNICAST_V6 = IPv6Network("2000::/3")
_SPECIAL_V6 = [
    IPv6Network("2001::/23"),  # Teredo tunnels, benchmarks, identifiers
    IPv6Network("2001:db8::/32"),
    IPv6Network("2002::/16"),  # 6to4: an IPv4 address in disguise
    IPv6Network("3fff::/20"),
]
_NAT64 = IPv6Network("64:ff9b::/96")  # how IPv6-only networks reach IPv4 (RFC 6052)


class AddressError(NetworkError):
    """A link that is not opened. The message says why, without the link."""


@dataclass(frozen=True)
class WebAddress:
    """A link taken apart and written in ASCII.

    Attributes:
        scheme: "http" or "https".
        host: a name in lower case (xn-- if it is international), or an IP address without brackets.
        port: 80 or 443.
        target: path and query as they go into the request, percent-encoded; begins with "/".
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        """Host, and port if it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"


def check_url(url: str) -> WebAddress:
    """Take a link apart, and refuse what is not plainly a public web address. Asks no name server.

    Escapes are kept, and what must not stand in a URL is percent-encoded, once. The fragment is dropped.

    Raises:
        AddressError: not http or https; another port than 80 and 443; a user name or password; control characters; a
            host that is no name and no public address in its usual spelling.
    """
    url = url.strip(" ")
    if len(url) > _LONGEST_URL:
        raise AddressError(f"an address of {len(url)} characters, expected at most {_LONGEST_URL}")
    check_characters(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # brackets that do not match, a port that is no number
        raise AddressError("a malformed address") from error
    if parts.scheme not in _PORTS:
        raise AddressError(f"scheme {parts.scheme[:20]!r}, expected http or https")
    if "@" in parts.netloc:
        raise AddressError("a user name or password in the address")
    if port is None:
        port = _PORTS[parts.scheme]
    if port not in _PORTS.values():
        raise AddressError(f"port {port}, expected 80 or 443")
    target = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE + "?")
    return WebAddress(parts.scheme, _checked_host(parts.netloc, parts.hostname or ""), port, target)


def check_characters(url: str) -> None:
    """Refuse control characters, which urllib takes out in silence, and what is not text (lone surrogates).

    Raises:
        AddressError: there is one.
    """
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in url):
        raise AddressError("control characters in the address")


def quoted(url: str) -> str:
    """A link for a message: escaped, and not longer than a few lines."""
    escaped = repr(url)
    return escaped if len(escaped) <= 200 else f"{escaped[:200]}..."


def _checked_host(netloc: str, host: str) -> str:
    if "[" in netloc or "]" in netloc:
        brackets = _BRACKETS.fullmatch(netloc)
        try:
            address_v6 = IPv6Address(brackets[1] if brackets else "")
        except ValueError as error:
            raise AddressError(f"host {netloc[:60]!r}, expected a name or an IP address") from error
        if not is_public(address_v6):
            raise AddressError(f"{address_v6} is not a public address")
        return str(address_v6)
    if not host.isascii():
        if _DEVIATIONS.search(host):
            raise AddressError(f"host {host[:60]!r} means different machines to different programs")
        try:
            host = host.encode("idna").decode("ascii").lower()
        except UnicodeError as error:
            raise AddressError(f"host {host[:60]!r} is not a name") from error
    host = host.removesuffix(".")
    if not _NAME.fullmatch(host) or len(host) > 253:
        raise AddressError(f"host {host[:60]!r}, expected a name or an IP address")
    if _NUMERIC.fullmatch(host):
        try:
            address_v4 = IPv4Address(host)
        except ValueError as error:
            raise AddressError(f"host {host[:60]!r}: an IP address in an unusual spelling") from error
        if not is_public(address_v4):
            raise AddressError(f"{address_v4} is not a public address")
    elif "." not in host:
        raise AddressError(f"host {host[:60]!r}: a name of the local network")
    return host


def public_addresses(host: str, resolve: Resolve) -> list[str]:
    """The IP addresses of a host, if all of them are public: one that is not would be a way into the local network.

    Args:
        host: as in WebAddress.
        resolve: asks the name server: a name to IP addresses; raises OSError. Called once, so that no second answer can
            differ from the checked one. Not called for an IP address.

    Raises:
        AddressError: an address is not public, or there is none.
        OSError: of `resolve`.
    """
    try:
        answers: Sequence[str] = [str(ip_address(host))]
    except ValueError:
        answers = resolve(host)
    addresses = []
    for answer in answers:
        try:
            address = ip_address(answer)
        except ValueError as error:
            raise AddressError(f"{host} leads to {answer[:60]!r}, which is no address") from error
        if not is_public(address):
            raise AddressError(f"{host} leads to {address}, which is not a public address")
        addresses.append(str(address))
    if not addresses:
        raise AddressError(f"{host} leads to no address")
    return list(dict.fromkeys(addresses))


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is one machine on the open internet.

    Not: loopback, private, link-local, shared (100.64/10), documentation, multicast, reserved, tunnels, and metadata
    services of clouds. An IPv4 address inside an IPv6 one (mapped, NAT64) is judged itself.
    """
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        special_v6 = any(address in network for network in _SPECIAL_V6)
        return address.is_global and address in _UNICAST_V6 and address.scope_id is None and not special_v6
    special_v4 = any(address in network for network in _SPECIAL_V4)
    return address.is_global and not address.is_multicast and not address.is_reserved and not special_v4
