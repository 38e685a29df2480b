"""All races under pytest-benchmark: `make bench`. A variant of the quick shape at a time."""

import pytest
import torch

from fastrl import bench
from fastrl.bench import peers

CPU = torch.device("cpu")
CASES = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op in bench.OPS
    for name in bench.load(op).variants(CPU)
]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_race(benchmark, op, name):
    race = bench.load(op)
    variant = race.variants(CPU)[name]
    if why := peers.missing(variant.peer, CPU):
        pytest.skip(why)
    (shape, *_) = race.shapes("quick", CPU)
    inputs = race.draw(shape, CPU)
    verdict = race.gate(variant, inputs, shape)
    assert verdict.wrong is None, f"{name}: {verdict.wrong}"
    mode = race.modes[-1]

    def setup():
        return (race.call(variant, race.before(variant, inputs, mode), mode),), {}

    benchmark.group = op
    benchmark.extra_info.update(shape=shape, errors=verdict.errors)
    benchmark.pedantic(lambda call: call(), setup=setup, rounds=5, warmup_rounds=1)
