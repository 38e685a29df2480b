"""fastrl bench: what is asked for, what is written, and what became slower."""

import copy
import io
import json
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastrl import bench
from fastrl.bench import command, measure, points, report
from fastrl.bench.race import describe
from fastrl.cli import app
from fastrl.kernels import native

CPU = torch.device("cpu")
SMALL = {"B": 3, "T": 17}
needs_native = pytest.mark.skipif(bool(native.why_missing), reason=str(native.why_missing))


def fastrl(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_report_names_files_without_their_folders():
    arguments = ["bench", "scan", "--json", "/a/b/c.json", "--plot=../d.png", "--modes", "a b"]
    assert measure.typed(arguments) == "fastrl bench scan --json c.json --plot=d.png --modes 'a b'"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of a small run, as the command line writes it, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    shapes = folder / "shapes.json"
    shapes.write_text(json.dumps({"scan": [SMALL]}))
    arguments = ("--shapes", shapes, "--json", folder / "out.json", "--plot", folder / "out.png")
    result = fastrl("bench", "scan", *arguments, "--seconds", 0.2, "--no-peak", "--against",
                    "eager,openvino")  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, " ".join(result.output.split())


def test_a_run_writes_what_it_shows(written):
    folder, output = written
    found = json.loads((folder / "out.json").read_text())
    (point,) = found["points"]
    assert point["op"] == "scan" and point["shape"] == SMALL
    assert {"inline loop", "reference"} <= set(point["variants"])
    times = point["variants"]["inline loop"]["forward"]
    assert 0 < times["best"] <= times["p20"] <= times["median"] <= times["p80"]
    assert found["machine"]["torch"] == torch.__version__ and found["versions"]["fastrl"]
    assert found["threads"] >= 1 and found["environment"]["OMP_NUM_THREADS"]
    assert found["clock"] == "wall"
    assert "nothing of scan races it on cpu yet" in found["missing"]["openvino"]
    for words in ("scan: B=3 T=17", "inline loop", "without openvino", "GB/s"):
        assert words in output
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


@needs_native
def test_compare_exits_with_1_where_ours_became_slower(written):
    folder, _ = written
    now = folder / "out.json"
    again = ("--json", now, "--resume", "--no-peak", "--against", "eager")
    result = fastrl("bench", "--compare", now, *again)
    assert result.exit_code == 0 and "no regression" in result.output, result.output
    old = json.loads(now.read_text())
    for statistic in ("median", "p20", "p80", "best"):
        old["points"][0]["variants"]["fastrl"]["forward"][statistic] /= 100
    (folder / "old.json").write_text(json.dumps(old))
    result = fastrl("bench", "--compare", folder / "old.json", *again)
    assert result.exit_code == 1 and "1 regressions" in result.output, result.output
    assert "slower" in result.output


def made_up(median, spread=0.0, peer="fastrl", rounds=9):
    """A report of one point of one variant."""
    times = {"median": median, "p20": median - spread / 2, "p80": median + spread / 2}
    times["rounds"] = rounds
    point = {"op": "scan", "shape": dict(SMALL), "bounds": {"forward": {}}}
    variant = {"peer": peer, "forward": times}
    machine = {"cpu": "this", "family": "one", "gpu": None}
    same = {"device": "cpu", "threads": 2, "isa": "avx2", "machine": machine}
    return same | {"points": [point | {"variants": {"v": variant}}]}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (made_up(1.0), made_up(1.04), "same"),  # within 5%
        (made_up(1.0), made_up(1.06), "slower"),
        (made_up(1.0, 0.1), made_up(1.06, 0.1), "same"),  # (0.1 + 0.1) / 2 is 10% of noise
        (made_up(1.0, 0.1), made_up(1.11, 0.1), "slower"),
        (made_up(1.0), made_up(0.9), "faster"),
        (made_up(1.0), made_up(1.2, rounds=1), "same"),  # a single round has no percentiles
    ],
)
def test_noise_band_by_hand(old, new, verdict):
    (row,) = report.compare(old, new)
    assert row["verdict"] == verdict
    assert row["ratio"] == pytest.approx(new["points"][0]["variants"]["v"]["forward"]["median"])
    assert bool(report.regressions([row])) == (verdict == "slower")


def test_what_turned_wrong_is_a_regression_and_a_slower_peer_is_none():
    new = made_up(1.0)
    new["points"][0]["variants"]["v"] = {"peer": "fastrl", "wrong": "grad is off by 1"}
    assert report.regressions(report.compare(made_up(1.0), new))
    assert report.wrong(new) == ["scan B=3 T=17, v: grad is off by 1"]
    slower = report.compare(made_up(1.0, peer="trl"), made_up(2.0, peer="trl"))
    assert slower[0]["verdict"] == "slower" and not report.regressions(slower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(threads=1), "threads=1"),
        (lambda r: r.update(clock="CPU time"), "clock='CPU time', this is 'wall'"),
        (lambda r: r["machine"].update(cpu="another"), "another machine: cpu 'another'"),
        (lambda r: r["points"][0]["shape"].update(B=9), "no variant of a shape in common"),
    ],
)
def test_reports_that_cannot_be_compared(change, message):
    old = copy.deepcopy(made_up(1.0))
    change(old)
    with pytest.raises(ValueError, match=message):
        report.compare(old, made_up(1.0))


def shown(show, found, width):
    """The lines that ``show`` prints on a terminal of a width."""
    console = Console(width=width, file=io.StringIO())
    show(found, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("op", bench.OPS)
def test_a_row_is_a_line_at_80_columns(op):
    """Of every race, with figures as wide as they come."""
    race = bench.load(op)
    (shape, *_) = race.shapes("default", CPU)
    times = {"median": 12.345, "p20": 11.111, "p80": 13.333, "rounds": 9}
    bounds = {
        m: {"floor": 1.2, "by": "operations", "operations": 1e13, "bytes": 1e9} for m in race.modes
    }
    modes = dict.fromkeys(race.modes, times) | {"extra_mb": dict.fromkeys(race.modes, 12345.6)}
    variants = {
        n: modes | {"peer": v.peer, "errors": {"x": 1e-5}} for n, v in race.variants(CPU).items()
    }
    point = {"op": op, "shape": shape, "bounds": bounds, "variants": variants}
    narrow, wide = (shown(report.show_point, point, width) for width in (80, 200))
    assert narrow[0] == wide[0] == f"{op}: {describe(shape)}"
    for name in variants:
        for mode in race.modes:
            row = rf"^ {re.escape(name)} +{mode} +12345 "
            assert len([line for line in narrow if re.match(row, line)]) == 1, (name, narrow)
    (heads,) = (line.split() for line in wide if "variant" in line)
    assert heads[2:] == ["ms", "20-80%", "x", "rate", "peak", "+MB", "error"]
    row = {"op": op, "shape": shape, "ratio": 1.0, "band": 0.05, "verdict": "same", "ours": True}
    rows = [row | {"variant": n, "mode": m} for n in variants for m in race.modes]
    lines = shown(report.show_comparison, rows, 80)
    assert all(any(line.startswith(f" {n} ") and "±5%" in line for line in lines) for n in variants)


def test_shapes_from_an_option_a_grid_and_an_old_report():
    one = command.shapes_of(["logprob"], CPU, single=["N=3,dtype=float32,entropy=true,ignored=0.5"])
    (shape,) = one["logprob"]
    assert (shape["N"], shape["dtype"], shape["entropy"], shape["ignored"]) == (
        3,
        "float32",
        True,
        0.5,
    )
    assert shape["V"] == bench.load("logprob").defaults["V"]
    assert describe(shape) == "N=3 H=896 V=151936 float32 ignored=0.5 entropy"
    assert set(command.shapes_of([], CPU, "quick")) == set(bench.OPS)
    assert command.shapes_of([], CPU, old=made_up(1.0)) == {"scan": [SMALL]}
    assert len(command.shapes_of(["logprob"], CPU, "full")["logprob"]) == 9 * 3 * 4 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "op 'nothing' has no benchmark; choose from scan"),
        (["scan", "--against", "them"], "--against 'them' is unknown"),
        (["scan", "--grid", "huge"], "scan has no grid 'huge'; it has quick, default"),
        (["scan", "--shape", "B=x"], "'x' is not a number"),
        (["scan", "--shape", "N=1"], "scan: shape has 'N'; it may have B, T"),
        (["--shape", "N=1"], "--shape is of one op"),
        (["--quick", "--grid", "full"], "exclude each other"),
        (["--resume"], "--resume goes with the --json file"),
        (["--isa", "sse"], "--isa 'sse' is not one of generic"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["scan", "--modes", "both"], "--modes 'both': scan has forward"),
        (["--compare", "pyproject.toml"], "is not a report of fastrl bench --json"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message):
    result = fastrl("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_ladder_by_hand():
    """What each part multiplies the speed by, and their product; nothing where one is missing."""
    race = bench.load("score")
    times = dict(zip(race.ladder.values(), (12.0, 16.0, 8.0, 4.0, 1.0, 0.5), strict=True))
    variants = {name: {"forward": {"median": seconds}} for name, seconds in times.items()}
    assert variants.keys() <= race.variants(CPU).keys()
    found = report.ladder({"op": "score", "variants": variants}, "forward")
    parts = {"unpadded": 0.75, "shared prompt": 2.0, "last layer": 2.0, "int8": 4.0}
    assert found == {**parts, "bf16 between": 2.0}
    variants.pop("HF float32")
    assert report.ladder({"op": "score", "variants": variants}, "forward") == {}
    assert report.ladder({"op": "scan", "variants": variants}, "forward") == {}


def test_a_limit_leaves_out_the_largest_shapes_of_all_ops():
    scan, sample = bench.load("scan"), bench.load("sample")
    shapes = {
        "scan": [scan.complete({"B": b}) for b in (64, 2, 8)],
        "sample": [sample.complete({"M": 16})],
    }
    order = [(op, shape.get("B", shape.get("M"))) for op, shape in points.in_turns(shapes)]
    assert order == [("scan", 2), ("sample", 16), ("scan", 8), ("scan", 64)]
