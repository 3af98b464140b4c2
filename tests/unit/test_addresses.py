import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest

from minisd.prepare import addresses
from minisd.prepare.addresses import AddressError, check_url, is_public, public_addresses
from minisd.prepare.fetch import Fetcher, FetchError

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "172.32.0.1", "100.128.0.1", "198.20.0.1", "192.169.0.1",
          "223.255.1.1", "2606:4700:4700::1111", "2a00:1450:4001:82a::2004", "2001:4860:4860::8888",
          "::ffff:8.8.8.8", "64:ff9b::808:808"]  # fmt: skip
MAPPED = [f"::ffff:{address}" for address in PUBLIC if ":" not in address]
NOT_PUBLIC = [
    # this machine, this network
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "::1", "::", "10.0.0.1", "10.255.255.255", "172.16.0.1",
    "172.31.255.255", "192.168.0.1", "169.254.0.1", "fe80::1", "febf::1", "fc00::1", "fdff::1", "fec0::1",
    # shared, special, documentation, benchmarks, multicast, reserved
    "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1",
    "198.19.255.255", "192.88.99.1", "224.0.0.1", "233.252.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "ff02::1", "ff0e::1", "100::1", "2001:db8::1", "3fff::1", "5f00::1", "4000::1", "8000::1", "2001:2::1",
    "2001:20::1",
    # the metadata services of clouds
    "169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16",
    # an IPv4 address inside: mapped, compatible, translated, NAT64, 6to4, Teredo
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:808:808::1", "2001::1",
]  # fmt: skip
LOOPBACK = ["127.0.0.1", "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0x7f.1", "0177.0.0.01",
            "0X7F.0x0.0x0.0x1", "127.0.0.1.", "127.0.00.1", "\uff11\uff12\uff17.0.0.1",
            "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021", "127.0.0.\u24ea\u2460",
            "127.0.0\u00ad.1"]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_told(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_told(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "written"),
    [
        # B8: an escape stays what it is, and what is none becomes one, once
        ("http://cats.example/a%20b%2Fc.jpg?q=%C3%A9&x=a+b", None),
        ("http://cats.example/a b.jpg", "http://cats.example/a%20b.jpg"),
        (
            "http://cats.example/caf\u00e9/\U0001f431.png?n=\u00e9",
            "http://cats.example/caf%C3%A9/%F0%9F%90%B1.png?n=%C3%A9",
        ),
        ("http://cats.example/%zz%", None),
        ('http://cats.example/<"{}|\\^`>', "http://cats.example/%3C%22%7B%7D%7C%5C%5E%60%3E"),
        ("http://cats.example/a;b=c,d/@x:y!$&'()*~.jpg?a=/?:@", None),
        ("http://cats.example/\u202egpj.exe", "http://cats.example/%E2%80%AEgpj.exe"),
        # what a link need not have, and what it may
        ("http://cats.example", "http://cats.example/"),
        ("https://cats.example?x=1", "https://cats.example/?x=1"),
        ("HTTPS://Cats.Example./A.JPG#top", "https://cats.example/A.JPG"),
        ("  http://cats.example/ ", "http://cats.example/"),
        ("http://cats.example:80/", "http://cats.example/"),
        ("http://cats.example:/", "http://cats.example/"),
        ("http://cats.example:443/", None),
        ("https://a_b.cats-1.example/", None),
        # names in other scripts
        ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/"),
        ("http://\u732b\u3002example/", "http://xn--z7x.example/"),
        ("http://xn--bcher-kva.example/", None),
        # public addresses
        ("http://8.8.8.8/", None),
        ("https://[2606:4700:4700:0:0:0:0:1111]:80/", "https://[2606:4700:4700::1111]:80/"),
    ],
)
def test_a_link_is_written_in_ascii_and_escaped_once(url: str, written: str | None) -> None:
    address = check_url(url)
    assert str(address) == (written or url)
    assert check_url(str(address)) == address
    assert address.host_header + address.target in str(address)


HOSTS_REFUSED = {
    "malformed": ["[::1", "::1]", "[cats.example]", "cats.example\uff0fx", "a\u2100b", "fe80::1%25lo", "cats.example:x",
                  *(f"cats.example:{port}" for port in ("65536", "-80", "+80", "8_0", "80:80", " 80"))],
    "user name": [f"{user}@cats.example" for user in ("me", "me:secret", "", ":", "cats.example:80", "a.b\\")],
    "port": [f"cats.example:{port}" for port in (0, 22, 8080, 6379, 65535)],
    "expected a name": ["cats .example", "cats%2eexample", "%31%32%37.0.0.1", "cats.example\\.x", "cats..example",
                        ".a.b", "cats.example..", "-", "-a.example", "a'b.example", "a." * 127 + "b",
                        "a" * 64 + ".example"],
    "malformed|expected a name": ["[8.8.8.8]", "[v1.a]", "[2606:4700::1%25eth0]", "[2606:4700::1111].cats.example",
                                  "[2606:4700::1111]x"],
    "local network": ["localhost", "LOCALHOST.", "router", "metadata", "xn--a"],
    "unusual spelling": ["134744072", "8.8.2056", "010.8.8.8", "0x8.8.8.8", "8.8.8.8.8", "8.8.8.256", "cats.1",
                         "cats.0x", "1.e.0xff"],
    "different machines": [f"{label}.example" for label in ("fa\u00df", "\u03c2", "a\u200db", "a\u200cb")],
    "not a name": [f"{label}.example" for label in ("\u00fc" * 64, "\u2060\u00fc.", "\u0627a")],
}  # fmt: skip
URLS_REFUSED = {
    "scheme": ["ftp://cats.example/x", "//cats.example/x", "gopher://cats.example/", "javascript://cats.example/", "x",
               "", "file:///etc/passwd", "file://cats.example/x", "data:image/png;base64,AAAA"],
    "expected a name": ["http:", "http:///", "http:///cats.example/", "http:/cats.example/", "http:cats.example"],
    "control": ["http://cats\n.example/", "\x01http://cats.example/", "ht\ttp://cats.example/",
                *(f"http://cats.example/{c}x" for c in "\0\t\r\n\x1b\x7f\x85\x9b\ud800")],
    "4116 characters": ["http://cats.example/" + "x" * 4096],
}  # fmt: skip
REFUSED = [(reason, url) for reason, urls in URLS_REFUSED.items() for url in urls]
REFUSED += [(reason, f"http://{host}/") for reason, hosts in HOSTS_REFUSED.items() for host in hosts]


@pytest.mark.parametrize(("reason", "url"), REFUSED)
def test_what_is_not_plainly_a_public_web_address_is_refused(url: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason) as refusal:
        check_url(url)
    assert len(str(refusal.value)) < 200
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("host", [*LOOPBACK, *(f"[{a}]" if ":" in a else a for a in NOT_PUBLIC)])
def test_the_local_network_is_refused_in_every_spelling(host: str) -> None:
    with pytest.raises(AddressError, match=r"not a public address|unusual spelling|expected a name"):
        check_url(f"http://{host}/")


def test_a_name_is_asked_for_once_and_all_its_addresses_must_be_public() -> None:
    asked = []

    def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        return {"good.example": ["8.8.8.8", "2606:4700::1", "8.8.8.8"], "none.example": []}.get(
            host, ["8.8.8.8", host[:-8]]
        )

    assert public_addresses("good.example", resolve) == ["8.8.8.8", "2606:4700::1"]
    assert asked == ["good.example"]
    for address in [*NOT_PUBLIC, "fe80::1%eth0", "2606:4700::1%eth0", "nonsense"]:
        with pytest.raises(AddressError):
            public_addresses(f"{address}.example", resolve)
    with pytest.raises(AddressError, match="no address"):
        public_addresses("none.example", resolve)
    asked.clear()
    assert public_addresses("8.8.8.8", resolve) == ["8.8.8.8"]
    assert asked == []


class _Nowhere:
    """A network that notes where connections would go. Names that begin with "evil" lead to the local network."""

    def __init__(self) -> None:
        self.connected: list[str] = []

    def resolve(self, host: str) -> Sequence[str]:
        with suppress(OSError):
            return [socket.inet_ntoa(socket.inet_aton(host))]  # the most lenient reader of addresses that there is
        return [NOT_PUBLIC[sum(map(ord, host)) % len(NOT_PUBLIC)]] if "evil" in host else ["8.8.8.8", "2606:4700::1"]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append(address)
        raise ConnectionRefusedError

    def open_carelessly(self, url: str) -> None:
        """What a fetcher does that checks nothing."""
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        for address in [host] if ":" in host else self.resolve(host):
            with suppress(ConnectionRefusedError):
                self.connect(address, parts.port or 80, 1.0)


def _known_public(address: str) -> bool:
    return ip_address(address) in map(ip_address, [*PUBLIC, *MAPPED, "2606:4700::1"])


def _random_url(draws: random.Random) -> str:
    """A link to the local network, in disguise, and now and then one to the world."""
    pick = draws.choice
    number = int(ip_address(pick([a for a in NOT_PUBLIC if ":" not in a] if draws.random() < 0.8 else PUBLIC[:5])))
    octets = [number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255]
    parts = pick([octets, [*octets[:2], number & 0xFFFF], [octets[0], number & 0xFFFFFF], [number]])
    spelled = pick([".", ".", "\u3002", "\uff0e"]).join(
        pick(["{}", "{}", "{}", "0{:o}", "0x{:x}", "{:03}"]).format(n) for n in parts
    )
    if draws.random() < 0.1:
        spelled = "".join(chr(ord(c) + 0xFEE0) if c.isdigit() and draws.random() < 0.5 else c for c in spelled)
    v6 = pick([a for a in NOT_PUBLIC if ":" in a])
    hosts = [spelled, spelled, spelled + ".", spelled.replace(".", "%2e"), f"[::ffff:{ip_address(number)}]"]
    hosts += [f"[{v6}]", f"[{ip_address(v6).exploded}]", f"[{v6}%25lo]"]
    hosts += [f"evil{number}.example", f"EVIL{number}.Example.", "localhost", "good.example"]
    before = pick(["", "", "", "", "good.example@", "good.example:80@", "good.example\\@", "good.example#@"])
    port = pick(["", "", "", ":80", ":443", ":", ":8080", ":080", ":\u0668\u0660"])
    scheme = pick(
        ["http://", "http://", "https://", "HTTP://", "http:/", "http:", "http:\\\\", "//", "ht\ttp://", " http://"]
    )
    after = pick(["/", "", "/x?y", "#/", "?", "\\good.example", "/\u00e9%20 ", "/\x00", "/../@good.example"])
    return scheme + before + pick(hosts) + port + after


def test_no_connection_leaves_for_a_local_address_whatever_a_link_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(0)
    urls = [_random_url(draws) for _ in range(2000)]
    guarded, bare, careless = _Nowhere(), _Nowhere(), _Nowhere()

    def try_all(network: _Nowhere) -> int:
        fetcher = Fetcher(resolve=network.resolve, connect=network.connect)
        for url in urls:
            with pytest.raises(FetchError) as failure:
                fetcher.fetch(url)
            assert len(str(failure.value)) < 500
            assert str(failure.value).isprintable()
        return sum(not _known_public(address) for address in network.connected)

    assert try_all(guarded) == 0
    assert len(guarded.connected) > 50  # those that do lead into the world
    for url in urls:
        with suppress(ValueError):
            careless.open_carelessly(url)
    assert sum(not _known_public(address) for address in careless.connected) > 500  # they are real attacks
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    assert try_all(bare) > 100  # and it is the check of the address that holds them
