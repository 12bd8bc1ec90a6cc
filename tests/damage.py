"""What damaged inputs are tried with: little memory, no patience, one-line refusals; and ways to damage bytes."""

import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coterie.errors import CoterieError

GIANTS = (
    0,
    1,
    2,
    7,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**48,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
MEMORY = 64 << 20
HANG_SECONDS = 60  # a guard against waiting for ever, no measure


@contextmanager
def little_memory_and_no_hang() -> Iterator[None]:
    """Make a big allocation fail, and a hang end in an error. What is loaded on first use counts: use it before."""

    def hang(*_: object) -> None:
        raise TimeoutError("damaged input made us hang")

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(use: Callable[..., object], *args: object) -> bool:
    """Whether `use(*args)` works; if not, it must have been refused in one line."""
    signal.alarm(HANG_SECONDS)
    try:
        use(*args)
    except CoterieError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert len(message) < 500
        assert "MemoryError" not in message
        return False
    finally:
        signal.alarm(0)
    return True


def damaged_bytes(chance: random.Random, content: bytes, end: int) -> bytes:
    """One or a few, before `end`, of: flipped bits, a number made absurd, bytes cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(max(1, min(end, len(data) - 8)))
        match chance.randrange(7):
            case 0 | 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2 | 3:
                size = chance.choice((4, 8))
                data[at : at + size] = (chance.choice(GIANTS) % 256**size).to_bytes(size, "little")
            case 4:
                del data[at : at + chance.choice((1, 4, 8, 100))]
            case 5:
                data[at:at] = data[at : at + chance.choice((1, 4, 8, 100))]
            case 6:
                del data[chance.randrange(len(data)) :]
        if len(data) < 9:
            break
    return bytes(data)
