"""fastrl doctor: the diagnosis, and the self-test that has to see a wrong kernel."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastrl import doctor, installation, kernels, selftest
from fastrl.cli import app
from fastrl.kernels import IMPLEMENTATIONS, native

CPU = torch.device("cpu")


def fastrl(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_diagnosis_names_the_machine_every_op_and_the_instruction_set():
    found = doctor.diagnose()
    assert found["facts"]["torch"] == torch.__version__
    assert found["facts"]["CPU"]
    ops = {op["op"] for op in found["ops"]}
    assert ops == {*IMPLEMENTATIONS, "RolloutEngine"}
    if native.why_missing:
        assert found["isas"] == [] and all(op["slow"] for op in found["ops"])
        assert found["missing"][0]["what"] == "native kernels"
    else:
        (used,) = (isa for isa in found["isas"] if isa["in_use"])
        assert used["name"] == native.module().isa() and used["compiled"] and used["runs_here"]
        assert not any(op["slow"] for op in found["ops"] if op["device"] == "cpu")


def test_a_missing_package_comes_with_its_command_and_its_cost(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "it is slow"})
    found = doctor.diagnose()["missing"]
    get = "pip install no_such_package"
    assert {"what": "no_such_package", "get": get, "costs": "it is slow"} in found
    output = " ".join(fastrl("doctor").output.split())
    assert f"missing: no_such_package; {get} (without: it is slow)" in output


def test_the_command_for_a_package_is_what_the_extras_ask_for():
    assert installation.get("trl") == "pip install 'trl>=1.16'"
    assert installation.get("reasoning_gym") == "pip install reasoning-gym"
    assert installation.get("unheard-of") == "pip install unheard-of"


def test_the_command_line_is_named_as_it_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fastrl", "other/fastrl"):
        path = tmp_path / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "fastrl").symlink_to(tmp_path / ".venv" / "bin" / "fastrl")
    here = tmp_path / ".venv" / "bin"
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    for typed, search, want in (
        (".venv/bin/fastrl", tmp_path, ".venv/bin/fastrl"),  # not on the PATH
        (".venv/bin/fastrl", here / "other", ".venv/bin/fastrl"),  # another one is
        (str(here / "fastrl"), here, "fastrl"),
        (str(here / "fastrl"), tmp_path / "link", "fastrl"),
        ("train.py", here, "fastrl"),  # from a script
        ("train.py", tmp_path, str(here / "fastrl")),
    ):
        monkeypatch.setattr(sys, "argv", [typed])
        monkeypatch.setenv("PATH", str(search))
        assert installation.program() == want
    (here / "fastrl").unlink()
    assert installation.program() == f"{here}/python -m fastrl"


@pytest.mark.parametrize(
    ("origin", "end"),
    [
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, " --editable '/a b'"),
        ({"url": "file:///a", "dir_info": {}}, " /a"),
        (
            {"url": "https://x.org/r", "vcs_info": {"vcs": "git", "commit_id": "c0"}},
            " git+https://x.org/r@c0",
        ),
        ({"url": "file:///a.whl", "archive_info": {}}, " . in a checkout of fastrl"),
        (None, " . in a checkout of fastrl"),
    ],
)
def test_the_command_that_rebuilds_is_for_where_fastrl_came_from(origin, end, monkeypatch):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(installation, "distribution", lambda _: Installed())
    assert installation.rebuild() == (
        f"pip install --force-reinstall --no-deps --no-cache-dir{end}"
    )


def test_missing_kernels_come_with_the_way_to_build_them(monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "why_missing", "not built")
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    monkeypatch.delenv("FASTRL_NATIVE", raising=False)
    found = doctor.diagnose()
    by_name = {m["what"]: m["get"] for m in found["missing"]}
    assert by_name["native kernels"].startswith("apt-get install g++, then pip install")
    assert by_name["C++ compiler"] == "apt-get install g++"
    assert {op["impl"] for op in found["ops"] if op["device"] == "cpu"} == {
        "reference",
        "flash",  # of attention alone
        "Hugging Face",
    }
    assert fastrl("doctor").exit_code == 1


def test_json_with_the_self_test(monkeypatch):
    few = {op: IMPLEMENTATIONS[op] for op in ("gae", "linear_sample")}
    monkeypatch.setattr(selftest, "IMPLEMENTATIONS", few)
    result = fastrl("doctor", "--selftest", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert set(found) == {"facts", "isas", "ops", "missing", "selftest"}
    verdicts = {(r["op"], r["verdict"]) for r in found["selftest"]}
    assert verdicts == {("gae", "right"), ("linear_sample", "right"), ("RolloutEngine", "right")}


def test_every_op_has_a_self_test():
    assert set(IMPLEMENTATIONS) <= set(selftest.CHECKS)


@pytest.mark.parametrize("op", selftest.CHECKS)
def test_self_test_is_right_here(op):
    impl = "reference" if native.unavailable("cpu", CPU) else "cpu"
    result = selftest.check(op, impl, CPU)
    assert result.verdict == "right", result


def scaled(op, factor):
    """The op, but its first result too large where it is not the reference."""
    right = getattr(kernels, op)

    def wrong(*args, impl="auto", **kwargs):
        out = right(*args, impl=impl, **kwargs)
        if impl == "reference":
            return out
        if isinstance(out, torch.Tensor):
            return out * factor
        return type(out)(*out)._replace(logprob=out[0] * factor)

    return wrong


@pytest.mark.parametrize("op", ["linear_logprob", "discounted_returns", "shared_prefix_attention"])
def test_self_test_sees_a_wrong_op(op, monkeypatch):
    monkeypatch.setattr(kernels, op, scaled(op, 1.01))
    result = selftest.check(op, "auto", CPU)
    assert result.verdict == "WRONG" and "off by" in result.wrong


def test_self_test_sees_a_wrong_gradient_alone(monkeypatch):
    right = kernels.logprob_from_logits

    def wrong(logits, *args, impl="auto", **kwargs):
        if impl != "reference":  # the same values, 1.01 times their gradient
            logits = logits + 0.01 * (logits - logits.detach())
        return right(logits, *args, impl=impl, **kwargs)

    monkeypatch.setattr(kernels, "logprob_from_logits", wrong)
    result = selftest.check("logprob_from_logits", "auto", CPU)
    assert result.verdict == "WRONG" and result.what.startswith("grad logits")


def test_self_test_sees_an_output_that_nobody_wrote(monkeypatch):
    right = kernels.gae

    def wrong(rewards, values, *, impl, **options):
        out = right(rewards, values, impl=impl, **options)
        if impl == "reference":
            return out
        advantages = torch.empty_like(out[0])
        advantages[:, :-1] = out[0][:, :-1]
        return advantages, out[1]

    monkeypatch.setattr(kernels, "gae", wrong)
    result = selftest.check("gae", "auto", CPU)
    assert result.verdict == "WRONG" and result.what.startswith("advantages")


def test_self_test_goes_on_past_an_op_that_raises_and_the_exit_code_says_so(monkeypatch):
    def broken(*_, impl, **__):
        raise RuntimeError("made to fail")

    few = {op: IMPLEMENTATIONS[op] for op in ("gae", "vtrace")}
    monkeypatch.setattr(selftest, "IMPLEMENTATIONS", few)
    monkeypatch.setattr(kernels, "gae", broken)
    result = fastrl("doctor", "--selftest", "--json")
    assert result.exit_code == 1
    verdicts = {r["op"]: r for r in json.loads(result.output)["selftest"]}
    assert verdicts["gae"]["wrong"] == "RuntimeError: made to fail"
    assert verdicts["vtrace"]["verdict"] == "right"


def test_buffers_are_poisoned_inside_and_not_after():
    with selftest._poisoned():
        assert torch.empty(5).isnan().all() and torch.ones(2).new_empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
