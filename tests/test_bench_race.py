"""The races of fastrl bench: what is wrong, too slow or missing, and what is measured."""

import time

import pytest
import torch

from fastrl import bench
from fastrl.bench import child, measure, peers, points
from fastrl.bench.race import Variant, Work, within

CPU = torch.device("cpu")


def race_small(variants, monkeypatch, memory=False):
    """What a process of a shape of scan tells, in this process."""
    monkeypatch.setattr(type(bench.load("scan")), "variants", lambda self, device: variants)
    events = []
    task = {"op": "scan", "shape": {"B": 3, "T": 17}, "variants": list(variants), "device": "cpu"}
    task |= {"memory": memory, "seconds": 0.05, "rounds": 5, "pause": 0.0}
    child.race_at(task, lambda **event: events.append(event))
    return events


def test_a_wrong_variant_is_reported_and_not_timed(monkeypatch):
    from fastrl.bench.bench_scan import inline_loop

    def wrong(rewards, values):
        advantages, returns = inline_loop(rewards, values)
        return advantages + 0.01, returns

    def broken(rewards, values):
        raise RuntimeError("no kernel for this shape")

    def lacking(rewards, values):
        raise NotImplementedError("it has no such thing")

    variants = {
        "right": Variant(inline_loop, "eager"),
        "wrong": Variant(wrong),
        "broken": Variant(broken, "trl"),
        "lacking": Variant(lacking, "trl"),
        "lacking of ours": Variant(lacking),
    }
    events = race_small(variants, monkeypatch)
    verdicts = {e["variant"]: e for e in events if "variant" in e}
    assert verdicts["wrong"]["wrong"].startswith("advantages is off by 0.01")
    assert verdicts["broken"]["failed"] == "RuntimeError: no kernel for this shape"
    assert verdicts["lacking"] == {"variant": "lacking", "skipped": "it has no such thing"}
    assert verdicts["lacking of ours"]["failed"] == "NotImplementedError: it has no such thing"
    assert "wrong" not in verdicts["right"] and verdicts["right"]["errors"]["returns"] < 1e-5
    (times,) = (e["times"] for e in events if "times" in e)
    assert list(times) == ["right"] and times["right"]["p20"] <= times["right"]["p80"]


def test_a_nan_is_wrong():
    assert within({"x": float("nan")}, 1.0).wrong and not within({"x": 1.0}, 1.0).wrong


@pytest.mark.skipif(not measure.can_measure_memory(CPU), reason="needs Linux")
def test_memory_is_what_a_call_takes_beyond_what_it_returns(monkeypatch):
    from fastrl.bench.bench_scan import inline_loop

    def hungry(rewards, values):
        torch.zeros(8 * 2**20, dtype=torch.float64).sum()  # 64 MB
        return inline_loop(rewards, values)

    variants = {"lean": Variant(inline_loop), "hungry": Variant(hungry, "eager")}
    events = race_small(variants, monkeypatch, memory=True)
    extra = {e["variant"]: e["extra_mb"]["forward"] for e in events if "variant" in e}
    assert extra["lean"] < 16 and 60 < extra["hungry"] < 96


def test_what_was_too_slow_or_is_too_large_is_left_out_and_said(monkeypatch):
    race = bench.load("logprob")
    shape = race.shapes("quick", CPU)[0]
    monkeypatch.setattr(measure, "available", lambda: 2.0**20)
    slow = {"eager": points.size(race, shape)}
    found = points.run_point(race, shape, ["eager", "TRL chunked"], points.Options(), slow)
    assert found["variants"]["eager"]["skipped"] == "took too long at a smaller size"
    assert found["variants"]["TRL chunked"]["skipped"].startswith("needs about")


def test_statistics_by_hand():
    found = measure.statistics_of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "best": 1.0, "rounds": 6}


def test_cpu_time_leaves_waiting_out():
    assert measure.seconds(lambda: time.sleep(0.2), CPU) >= 0.2
    assert measure.seconds(lambda: time.sleep(0.2), CPU, cpu_time=True) < 0.1


def test_turns_are_interleaved():
    order = []

    def call(name):
        return lambda: order.append(name) or 1.0

    measure.take_turns({n: call(n) for n in "ab"}, {"a": 3, "b": 2})
    assert sorted(order[:2]) == sorted(order[2:4]) == ["a", "b"] and order[4:] == ["a"]


def test_missing_peers_come_with_the_command_that_brings_them(monkeypatch):
    absent = peers.Peer("TRL", "no_such_package")
    monkeypatch.setitem(peers.PEERS, "trl", absent)
    names, missing = points.field(bench.load("logits"), None, CPU)
    assert missing["trl"] == "not installed: pip install no_such_package" and "TRL" not in names
    monkeypatch.setitem(peers.PEERS, "trl", peers.Peer("TRL", "no_such", "no-such-kernels"))
    assert peers.missing("trl", CPU) == "not installed: pip install no-such-kernels"
    monkeypatch.setitem(peers.PEERS, "trl", peers.Peer("TRL", besides=("no_such_writer",)))
    assert peers.missing("trl", CPU) == "not installed: pip install no_such_writer"
    assert missing["torch.compile"].endswith("fastrl bench logits --against compile")
    names, missing = points.field(bench.load("logits"), ["eager"], CPU)
    assert "eager" in names and "TRL" not in names and "trl" not in missing


@pytest.mark.parametrize("op", bench.OPS)
def test_every_race_is_whole(op):
    race = bench.load(op)
    assert race.op == op and race.about
    for grid in ("quick", "default"):
        assert race.shapes(grid, CPU)
    for shape in race.shapes("default", CPU):
        for mode in race.modes:
            work = race.work(shape, mode)
            assert isinstance(work, Work) and work.operations > 0 and work.bytes > 0
        assert set(race.small(shape)) <= set(race.defaults)
    variants = race.variants(CPU)
    assert all(v.peer in {"fastrl", *peers.PEERS} for v in variants.values())
    assert any(not v.ours for v in variants.values())


def test_work_by_hand():
    race = bench.load("logprob")
    shape = race.complete({"N": 4, "H": 8, "V": 16, "ignored": 0.5, "workspace_mb": 0.0})
    # Two of four rows count: 2 N H V = 512 operations; (V + N) H of 2 bytes.
    assert race.work(shape, "forward") == Work(512.0, 288.0, "bfloat16")
    assert race.work(shape, "both") == Work(4 * 512.0, 3 * 288.0, "bfloat16")
    assert race.work(shape | {"workspace_mb": 60.0}, "both").operations == 3 * 512.0
