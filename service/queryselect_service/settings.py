"""Everything an operator may set: one field = one flag = one environment variable = one TOML key.

`--queue-wait 60`, `QUERYSELECT_QUEUE_WAIT=60` and `queue_wait = 60` mean the same; the first of the three that is given
counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from queryselect_service.host import host_memory

PREFIX = "QUERYSELECT_"
MIB = 1 << 20
#: Seconds. What takes longer is a mistake, and clocks of systems end somewhere.
DAY = 86_400
#: What Kubernetes tells every pod of a Service whose name begins like ours; QUERYSELECT_PORT=tcp://… is one.
LINK = re.compile(r"\w*_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
#: What says whether, where all is text: bool("false") would be true.
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def setting(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, secret: bool = False
) -> Any:
    """A setting with its default, one line of documentation, and its smallest and largest value."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """The settings of one server."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50051, "port for gRPC; 0 takes a free one", low=0, high=65_535)
    metrics_port: int = setting(
        9090, "port for Prometheus' /metrics; -1 for none, 0 takes a free one", low=-1, high=65_535
    )
    health_port: int = setting(
        -1,
        "port for health checks alone, in plain text, for probes that speak no TLS; -1 for none, 0 takes a free one",
        low=-1,
        high=65_535,
    )
    tls_cert: str = setting("", "PEM file of the server's certificate and those that lead to its CA; empty: no TLS")
    tls_key: str = setting("", "PEM file of the certificate's private key")
    tls_client_ca: str = setting("", "PEM file of CAs, of one of which clients must show a certificate; empty: none")
    token_file: str = setting("", "TOML file of tokens, of which callers must show one; empty: whoever comes may call")
    allow_plaintext_tokens: bool = setting(
        False, "tokens without TLS on an address beyond loopback, where a proxy in front of this server ends TLS"
    )
    reflection: bool = setting(True, "whether tools may ask for the proto")
    device: str = setting(
        "auto",
        "torch devices for selections, separated by commas, one selection at a time on each; cuda: every GPU that is "
        "visible; auto: cuda where there is one, else cpu",
    )
    log_level: str = setting("INFO", "least severity that is logged")
    log_format: str = setting("auto", "form of the log: json, text, or auto, which is text on a terminal and else json")
    otlp_endpoint: str = setting(
        "", "address that traces are sent to by OTLP, such as http://localhost:4318/v1/traces; empty: none"
    )
    max_rows: int = setting(50_000_000, "rows of a pool, or of references", low=1)
    max_dims: int = setting(65_536, "dimensions of an embedding", low=1)
    max_classes: int = setting(100_000, "classes", low=1)
    max_budget: int = setting(1_000_000, "picks of one request", low=1)
    max_host_bytes: int = setting(
        int(0.6 * host_memory().total),
        "host memory for requests, each and all together, bytes; default 60 % of RAM, or of the container's limit",
        low=1,
    )
    max_inline_bytes: int = setting(64 * MIB, "bytes of one message", low=1024)
    max_id_bytes: int = setting(128, "bytes of one id", low=1)
    max_quotas: int = setting(8, "quotas of one request", low=0)
    max_references: int = setting(16, "reference sets of one request", low=0)
    max_streams_per_peer: int = setting(64, "streams open per peer", low=1)
    allow_uris: str = setting(
        "", "prefixes of addresses that requests may read tensors from, separated by commas; empty: none"
    )
    max_sources: int = setting(64, "tensors of one request that are read by reference", low=0)
    idle_stream: float = setting(30.0, "silence after which a stream is aborted, seconds", low=0, high=DAY)
    upload_grace: float = setting(60.0, "time that an upload may take, however slow, seconds", low=0, high=DAY)
    min_upload_rate: int = setting(
        64 << 10, "average speed below which an upload that takes longer is aborted, bytes per second; 0: none", low=0
    )
    max_queue: int = setting(64, "requests waiting for the device", low=0)
    queue_wait: float = setting(120.0, "longest wait for the device, seconds", low=0, high=DAY)
    queue_ageing: float = setting(
        10.0, "wait after which a request goes before shorter ones that came later, seconds", low=0, high=DAY
    )
    max_connection_age: float = setting(
        0.0,
        "time after which a connection takes no more requests, so that clients look again which servers there are, "
        "seconds; what runs goes on; 0: none",
        low=0,
        high=DAY,
    )
    drain_grace: float = setting(60.0, "time for running requests when the server stops, seconds", low=0, high=DAY)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, low, high = getattr(self, each.name), each.metadata["low"], each.metadata["high"]
            if low is not None and not value >= low:
                raise ValueError(f"{each.name} must be at least {low}; it is {value}")
            if high is not None and not value <= high:
                raise ValueError(f"{each.name} must be at most {high}; it is {value}")
        if self.otlp_endpoint:
            self._check_address(self.otlp_endpoint)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key need each other; only one is set")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key; they are not set")
        if self.token_file and not (self.tls_cert or self.allow_plaintext_tokens or _is_loopback(self.host)):
            raise ValueError(
                f"tokens would travel in clear text to {self.host}: set tls_cert and tls_key, or "
                "allow_plaintext_tokens where a proxy in front ends TLS"
            )

    @staticmethod
    def _check_address(address: str) -> None:
        """Raises ValueError for what is no address of traces. What it says is no secret: settings are logged."""
        parts = urlsplit(address)
        if parts.username or parts.password:
            raise ValueError("otlp_endpoint must hold no credentials; they belong in OTEL_EXPORTER_OTLP_HEADERS")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"otlp_endpoint must be an http or https address; it is {address!r}")

    def told(self) -> dict[str, Any]:
        """Every setting by name, secrets redacted."""
        return {
            each.name: "(redacted)" if each.metadata["secret"] else getattr(self, each.name)
            for each in dataclasses.fields(self)
        }

    def __str__(self) -> str:
        """One line per setting, secrets redacted."""
        return "\n".join(f"{name} = {value!r}" for name, value in self.told().items())


def _is_link(variable: str, text: str) -> bool:
    """Whether Kubernetes has set the variable."""
    return LINK.fullmatch(variable) is not None or (variable.endswith("_PORT") and "://" in text)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"must be true or false; it is {text!r}")
    return TRUTHS[text.lower()]


#: What makes a setting of a text.
PARSERS: dict[type, Callable[[str], Any]] = {str: str, int: int, float: float, bool: _truth}


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings from flags, then environment variables, then the TOML file of --config, then defaults.

    Raises ValueError for a name or a value that no setting has; argparse ends the process for a wrong flag.
    """
    kinds = get_type_hints(Settings)
    parser = argparse.ArgumentParser(prog="queryselect serve", description="Starts a QuerySelect server.")
    parser.add_argument("--config", help=f"TOML file with the same names (environment: {PREFIX}CONFIG)")
    for each in dataclasses.fields(Settings):
        flag = "--" + each.name.replace("_", "-")
        doc = f"{each.metadata['doc']} (default {each.default}; environment: {PREFIX}{each.name.upper()})"
        parser.add_argument(flag, type=PARSERS[kinds[each.name]], default=None, help=doc.replace("%", "%%"))
    flags = vars(parser.parse_args(arguments))

    given: dict[str, Any] = {}
    config = flags.pop("config") or environment.get(PREFIX + "CONFIG")
    if config:
        try:
            given.update(tomllib.loads(Path(config).read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"config {config}: {error}") from error
    names = {PREFIX + name.upper(): name for name in kinds}
    for variable, text in environment.items():
        if variable.startswith(PREFIX) and variable != PREFIX + "CONFIG" and not _is_link(variable, text):
            given[names.get(variable, variable)] = text
    given.update({name: value for name, value in flags.items() if value is not None})
    unknown = sorted(set(given) - set(kinds))
    if unknown:
        raise ValueError(f"there is no setting {', '.join(unknown)}; there are {', '.join(kinds)}")
    return Settings(**{name: _convert(name, value, kinds[name]) for name, value in given.items()})


def _convert(name: str, value: Any, kind: type) -> Any:
    """A text becomes what it says; a value that TOML or argparse gave a type already must have the right one."""
    try:
        if isinstance(value, str) or type(value) is kind or (kind is float and type(value) is int):
            return PARSERS[kind](value) if isinstance(value, str) else kind(value)
    except (ValueError, argparse.ArgumentTypeError):
        pass
    raise ValueError(f"{name} must be of type {kind.__name__}; it is {value!r}")
