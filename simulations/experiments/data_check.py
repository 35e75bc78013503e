"""What was understood of a configuration's data: before a network is loaded, or anything spent."""

from __future__ import annotations

from collections.abc import Iterator

from fedlora.common.config.schema import Config
from fedlora.common.model.base import check_base, resolve_base
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.overview import overview
from fedlora.simulations.begin import checked, sources_of
from fedlora.simulations.federation.sources import one_sided


def check_data(config: Config) -> Iterator[str]:
    """Lines on the training, validation and test records, as a run would read them.

    BadInput names file, row and column of what a run would end at.
    """
    config = checked(config)
    sources, model = sources_of(config), config.model
    base = resolve_base(model.base)
    check_base(base)
    tokenizer, task = load_tokenizer(base), sources.public.task
    parts = (sources.train, sources.public.validation, sources.public.test)
    for name, records in zip(("train", "validation", "test"), parts, strict=True):
        encoded = task.encode(records, tokenizer, model.max_length)
        yield f"{name}: {records.where}, {len(records)} records"
        for line in overview(records, encoded, task.labels, model.max_length):
            yield f"  {line}"
    yield from one_sided(sources.train, sources.public.test, task.labels)
