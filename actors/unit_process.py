"""A crew in a process of its own: what a Ray actor is for us. It maps the arena, starts lanes, and counts its pulse.

It ends with the process whose arena it is, whatever ends that.
"""

import os
import select
import threading
from typing import Any

from coterie.actors.greeting import greeting
from coterie.actors.host import Crew
from coterie.actors.lanes import NAP
from coterie.actors.messages import complaint, pack, unpack
from coterie.errors import CoterieError, UnitError
from coterie.kernels import library
from coterie.storage.arena import Arena, BufferRef

ORDERS = ("open", "load", "close")  # what a crew may be told


class UnitProcess:
    """Takes messages, one at a time."""

    def __init__(self) -> None:
        self._crew: Crew | None = None

    def handle(self, message: bytes) -> bytes:
        """Do what a message says; the answer, or an error as one."""
        try:
            order, arguments = unpack(message)
            if order == "attach":
                return pack(self._attach(**arguments))
            if self._crew is None or order not in ORDERS:
                raise UnitError(f"a unit's process does not know the order {order!r:.40}")
            return pack({"answer": getattr(self._crew, order)(**arguments)})
        except CoterieError as error:
            return pack(complaint(error))
        except (TypeError, ValueError, KeyError, OSError) as error:
            return pack(complaint(UnitError(f"a unit's process was told nonsense: {error}")))

    def _attach(self, home: str, arena: dict[str, Any], pulse: BufferRef) -> dict[str, Any]:
        """Map the arena, and show from now on that this process lives."""
        owner, mapped = os.pidfd_open(arena["pid"]), Arena.attach(arena)
        os.environ["COTERIE_HOME"] = home  # compiled kernels are there
        threading.Thread(target=_end_with, args=(owner,), name="coterie-owner", daemon=True).start()
        self._crew = Crew(mapped)
        mapped.numpy(pulse)[1, 2:4] = 0, NAP
        beat = library.function("lane_pulse", 1)
        threading.Thread(target=beat, args=(mapped.address(pulse),), name="coterie-pulse", daemon=True).start()
        return {"greeting": greeting()}


def _end_with(owner: int) -> None:
    """End this process when the owner of its memory has ended."""
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    while not poll.poll():
        pass
    os._exit(0)
