"""Network interfaces that gloo and NCCL are told to use. No torch."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping

from megalm.config.violation import spoken_list
from megalm.errors import ConfigError

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOPBACK = ("lo", "lo0")


def loopback_alone(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for ranks that are all on this machine: whatever the shell says of others, loopback is enough.

    Left to itself, gloo would look for the machine's own name, which a laptop may not resolve.
    """
    here = _interfaces()
    loopback = next((name for name in _LOOPBACK if name in here), None)
    if loopback is None:
        return {}
    wanted = environ.get(_NCCL, "").lstrip("^=").split(",")
    lost = environ.get(_NCCL) and not any(name and found.startswith(name) for name in wanted for found in here)
    return {_GLOO: loopback, **({_NCCL: loopback} if lost else {})}


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Refuse an interface that this machine has not, where gloo would throw.

    Raises:
        ConfigError: naming those that there are.
    """
    text, here = environ.get(_GLOO, ""), _interfaces()
    missing = [name for name in text.split(",") if name and name not in here]
    if missing and here:
        raise ConfigError(
            f"{_GLOO}={text}: {platform.node()} has no network interface {spoken_list(missing)}; it has "
            f"{spoken_list(here, 'and')}; name one that other machines reach, or unset it"
        )


def _interfaces() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []
