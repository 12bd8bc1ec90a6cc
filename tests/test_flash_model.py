"""The model of a phone's flash gives what was printed of it (checklist row 18)."""

import itertools

import pytest

from coterie.errors import UsageError
from coterie.scheduler.flash_model import FlashModel, FlashPoint, between
from coterie.scheduler.soc_file import flash_of_soc

MB, GB, SPAN = 1e6, 1e9, 128 << 20
PRINTED = [  # PowerInfer-2, section 2.3.2, figure 3b, table 1
    ({"pattern": "sequential", "block": 4 << 10}, 450 * MB),
    ({"pattern": "sequential", "block": 512 << 10}, 4 * GB),
    ({"pattern": "random", "block": 512 << 10}, 3.5 * GB),
    ({"pattern": "random", "block": 4 << 10, "span": SPAN}, 1076.10 * MB),
    ({"pattern": "random", "block": 4 << 10, "span": SPAN, "core": "mid"}, 1007.95 * MB),
    ({"pattern": "random", "block": 4 << 10, "span": SPAN, "core": "little"}, 761.87 * MB),
    ({"pattern": "random", "block": 4 << 10, "span": 512 << 20}, 850 * MB),
    ({"pattern": "random", "block": 4 << 10, "span": SPAN, "readers": 4}, 0.6 * 1076.10 * MB),
]


@pytest.mark.parametrize(("reads", "rate"), PRINTED)
def test_printed_points(reads: dict[str, object], rate: float) -> None:
    assert flash_of_soc("snapdragon-8gen3").bandwidth(**reads) == pytest.approx(rate, rel=0.05)  # type: ignore[arg-type]


def test_larger_blocks_and_smaller_spans_are_never_slower() -> None:
    flash = flash_of_soc("snapdragon-8gen3")
    blocks, spans = [4096 << i for i in range(9)], [64 << 20, SPAN, 200 << 20, 512 << 20, 0]
    for span, core in itertools.product(spans, ("big", "mid", "little")):
        rates = [flash.bandwidth("random", block, span=span, core=core) for block in blocks]
        assert rates == sorted(rates)
    for block in blocks:
        rates = [flash.bandwidth("random", block, span=span) for span in spans]
        assert rates == sorted(rates, reverse=True)


def test_between_points() -> None:
    points = [(4.0, 2.0), (16.0, 8.0)]
    assert [between(x, points) for x in (1, 4, 8, 16, 99)] == pytest.approx([2, 2, 4, 8, 8])


def test_what_is_not_known_is_said() -> None:
    flash = FlashModel((FlashPoint("random", 4096, 1e9),))
    with pytest.raises(UsageError, match="nothing is known of sequential reads"):
        flash.bandwidth("sequential", 4096)
    with pytest.raises(UsageError, match="little core"):
        flash.bandwidth("random", 4096, core="little")
    with pytest.raises(UsageError, match="no device is called 'toaster'"):
        flash_of_soc("toaster")
