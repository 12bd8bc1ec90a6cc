"""Tiny models cut by layers, their parts in this process behind frames; and where real models are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from exact_models import CONTEXT
from packed_models import smallest

from coterie.actors.link import Call, Chain, Link
from coterie.actors.part_server import Server
from coterie.cut import contract_of, serve
from coterie.errors import PlanError
from coterie.models.load import Model, read_spec
from coterie.models.part import part_of
from coterie.opening import open_model
from coterie.part_engine import PartEngine
from coterie.scheduler.plan import Wishes
from coterie.storage.flash_writer import pack_model

Carrier = Callable[[Server], Call]


def part_model(path: Path, first: int, last: int) -> Model:
    model = open_model(path)
    made = part_of(model.source, model.spec, first, last)
    return replace(model, file=made, spec=read_spec(made))


def packed_part(path: Path, first: int, last: int) -> Path:
    """The same packed, beside the model."""
    out = path.with_name(f"{path.stem}-{first}-{last}.coterie")
    with part_model(path, first, last).file as file:
        model = open_model(path)
        pack_model(replace(model, file=file, spec=read_spec(file)), out, lambda label, done, total: None)
        model.close()
    return out


@contextmanager
def part_engine(model: Model, threads: int = 1, **wishes: Any) -> Iterator[PartEngine]:
    """An engine; `memory` may be too little, then it gets as little as can be."""
    wanted = Wishes(threads=threads, context=CONTEXT, **wishes)
    try:
        engine = PartEngine(model, wanted)
    except PlanError:
        engine = PartEngine(open_model(model.file.path), replace(wanted, memory=smallest(model)))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def linked(
    models: Sequence[Model], carry: Carrier = lambda server: server.handle, **wishes: Any
) -> Iterator[PartEngine]:
    """The last part as an engine, those before it behind servers."""
    with ExitStack() as stack:
        *fronts, back = [stack.enter_context(part_engine(model, **wishes)) for model in models]
        links = []
        for front in fronts:
            part = front.spec.part
            assert part is not None
            links.append(Link(carry(serve(front)), contract_of(back, part.first, part.last)))
        back.front = Chain(links)
        for link in links:
            link.check()
        yield back


@contextmanager
def cut(path: Path, *cuts: int, **options: Any) -> Iterator[PartEngine]:
    """A model cut before these layers."""
    model = open_model(path)
    ends = [0, *cuts, len(model.spec.layers)]
    model.close()
    models = [part_model(path, first, last) for first, last in pairwise(ends)]
    with linked(models, **options) as engine:
        yield engine
