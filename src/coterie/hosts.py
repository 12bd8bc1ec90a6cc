"""Choosing a host: what keeps the units of a model alive."""

from collections.abc import Callable

from coterie.actors.host import Host, ThreadHost
from coterie.errors import UsageError

HOSTS = ("threads", "ray")


def check_host(name: str, ray_address: str | None) -> None:
    """Raises UsageError for a host that there is not."""
    if ray_address is not None and not isinstance(ray_address, str):
        raise UsageError(f'a Ray address is {ray_address!r}: give text such as "127.0.0.1:6379", or "auto"')
    if name not in HOSTS:
        raise UsageError(f"host is {name!r}: there are {' and '.join(HOSTS)}")
    if ray_address is not None and name != "ray":
        raise UsageError("a Ray address is for the Ray host: --host ray")


def open_host(name: str, ray_address: str | None, progress: Callable[..., None] | None) -> Host:
    """The host of that name; "ray" starts Ray, or joins the one at `ray_address`. Close it, or the engine it is given
    to. Raises UsageError, and UnitError where there is no Ray."""
    check_host(name, ray_address)
    if name == "threads":
        return ThreadHost()
    from coterie.actors.ray_host import RayHost
    from coterie.actors.ray_session import open_session
    from coterie.configs import placement

    placement()  # what is wrong with it is said before Ray is started
    return RayHost(open_session(ray_address, progress=progress or (lambda label: None)))
