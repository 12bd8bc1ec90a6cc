"""What is known of models' products, for people and as data."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.scheduler.profile import ProductTimes, Shapes, UnitTimes


def shapes_dict(shapes: "Shapes") -> dict[str, Any]:
    """All of it as data, with the known error of estimates by unit (None: not known)."""
    from coterie.scheduler.estimate import known_error

    found = {name: known_error(unit) for name, unit in shapes.units.items()}
    return {"shapes": asdict(shapes), "errors": {name: error and error._asdict() for name, error in found.items()}}


def shape_lines(shapes: "Shapes") -> list[str]:
    """Tables by unit: us of whole products by tokens, and how wrong estimates in between are."""
    lines = list[str]()
    for name, unit in shapes.units.items():
        lines += [f"{name}, {unit.key}: us by tokens", *_table(unit), *_summary(unit), ""]
    for pair, rate in shapes.together.items():
        lines.append(f"{pair.replace('+', ' and ')} together read {rate / 1e9:.1f} GB/s")
    if shapes.units:
        copies = f"rows are copied at {shapes.copy / 1e9:.1f} GB/s"
        lines += [f"a flag is seen after {1e6 * shapes.sync:.0f} us; {copies}", ""]
    return lines


def _table(unit: "UnitTimes") -> list[str]:
    tokens = sorted({point.tokens for times in unit.products for point in times.points})
    lines = ["  " + " " * 34 + "".join(f"{each:>9}" for each in tokens)]
    for times in unit.products:
        whole = {point.tokens: f"{1e6 * point.seconds:.0f}" for point in times.points if point.rows == _rows(times)}
        lines.append(f"  {_name(times):34}" + "".join(f"{whole.get(each, ''):>9}" for each in tokens))
    return lines


def _rows(times: "ProductTimes") -> int:
    return max(point.rows for point in times.points)


def _name(times: "ProductTimes") -> str:
    product = times.product
    return f"{product.operator} {product.rows} x {product.columns} {product.format}"


def _summary(unit: "UnitTimes") -> list[str]:
    from coterie.scheduler.estimate import known_error

    error = known_error(unit)
    known = f"{100 * error.median:.1f} % (p90 {100 * error.p90:.1f} %)" if error else "not known"
    launch = f"launch {1e6 * unit.launch:.2f} us, {1e6 * unit.queued:.2f} behind another one"
    return [f"  {launch}; reads {unit.bandwidth / 1e9:.1f} GB/s; estimates between points are off by {known}"]
