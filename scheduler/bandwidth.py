"""What units that work at the same time do to each other: they share the memory's bandwidth."""

from collections.abc import Sequence

NOTHING = 1e-12  # of a time: less is over


def shared(wants: Sequence[float], together: float) -> list[float]:
    """What share of its wish each gets of `together` bytes/s: an equal part at most, while that is too little for all
    (water filling)."""
    if sum(wants) <= together:
        return [1.0] * len(wants)
    shares, left = [1.0] * len(wants), together
    order = sorted(range(len(wants)), key=wants.__getitem__)
    for done, i in enumerate(order):
        equal = left / (len(order) - done)
        given = min(wants[i], equal)
        shares[i] = given / wants[i] if wants[i] else 1.0
        left -= given
    return shares


def until_all_end(works: Sequence[tuple[float, float]], together: float) -> float:
    """Seconds until works, each of so many seconds alone and so many bytes, that start at once are over, while all of
    them read `together` bytes/s at most."""
    left, now = [(seconds, nbytes / seconds) for seconds, nbytes in works if seconds > 0], 0.0
    while sum(wants for _, wants in left) > together:
        speeds = shared([wants for _, wants in left], together)
        passed = min(seconds / speed for (seconds, _), speed in zip(left, speeds, strict=True))
        now += passed
        after = [(s - passed * speed, wants) for (s, wants), speed in zip(left, speeds, strict=True)]
        left = [(s, wants) for s, wants in after if s > NOTHING * now]
    return now + max((seconds for seconds, _ in left), default=0.0)
