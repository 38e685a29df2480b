"""Races of the ops against what else does them: `fastrl bench`.

`bench_<op>.py` says what an op's race is (race.py says what that takes); everything else runs any
of them: points.py in a process a shape (child.py), measure.py takes the times, report.py and
plot.py show them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrl.bench.race import Race

# The races that `fastrl bench` runs, in this order.
OPS = (
    "scan",
    "logits",
    "sample",
    "quant",
    "score",
    "logprob",
    "attention",
    "layers",
    "decode",
    "rollout",
    "shared_prefix",
    "trainer",
)


def load(op: str) -> "Race":
    """The race of ``op``; ValueError where there is none."""
    if op not in OPS:
        raise ValueError(f"op {op!r} has no benchmark; choose from {', '.join(OPS)}")
    return importlib.import_module(f"fastrl.bench.bench_{op}").RACE
