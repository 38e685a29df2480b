"""One point of bench_logprob.py, in a process of its own: a task in, events out, as JSON lines.

A process for each point keeps a crash or a lack of memory to that point, and lets the environment
that oneDNN and ATen read when they start be chosen for it.
"""

import inspect
import json
import os
import resource
import sys
import time
from functools import partial

import accuracy
import baselines
import measure
import torch
from baselines import IGNORE, OURS, VARIANTS

NONE_IGNORED = f"{OURS}, none ignored"  # the same call on the same rows with all of them counted


def draw(tokens, width, vocab, dtype, ignored=0.0):
    """hidden, weight and target with a share of the rows ignored; logits have a deviation of 2."""
    g = torch.Generator().manual_seed(0)
    of = getattr(torch, dtype)
    hidden = torch.empty(tokens, width, dtype=of).normal_(generator=g)
    weight = torch.empty(vocab, width, dtype=of).normal_(std=2 / width**0.5, generator=g)
    target = torch.randint(vocab, (tokens,), generator=g)
    drop = torch.randperm(tokens, generator=g)[: tokens - baselines.counted(tokens, ignored)]
    masked = target.index_fill(0, drop, IGNORE)
    return hidden.requires_grad_(), weight.requires_grad_(), masked, target


def functions(task) -> dict:
    """The task's variants; ours with its options."""
    chosen = {name: f for name, f in VARIANTS.items() if name in task["variants"]}
    if OURS in chosen and task["workspace_mb"] is not None:
        chosen[OURS] = partial(chosen[OURS], workspace_mb=task["workspace_mb"])
    return chosen


def workspace_mb(task) -> float:
    from fastrl.kernels import linear_logprob

    default = inspect.signature(linear_logprob).parameters["workspace_mb"].default
    return default if task["workspace_mb"] is None else task["workspace_mb"]


def forward(function, hidden, weight, target, entropy):
    with torch.no_grad():
        return function(hidden, weight, target, entropy)


def both(function, hidden, weight, target, entropy):
    out = function(hidden, weight, target, entropy)
    loss = sum(out[name].sum() for name in ("logprob", "entropy") if name in out)
    return out, *torch.autograd.grad(loss, (hidden, weight))


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def announced(emit, name, call) -> float:
    emit(started=name)
    return seconds(call)


def checked(name, function, inputs, entropy, truth) -> tuple[dict, str | None]:
    """Errors of a variant, and what is wrong with it."""
    errors = truth.errors(*both(function, *inputs, entropy))
    return errors, truth.verdict(name, errors)


def rounds_in(share, call, first, rounds) -> int:
    """How many rounds fit into ``share`` seconds; a slow first call may have compiled."""
    if first * rounds <= share:
        return rounds
    return max(1, min(rounds, int(share / max(seconds(call), 1e-9))))


def timed(task, emit):
    """Events: reference; for each variant started, then errors or failed; at the end times.

    "started" comes before every call, so that the parent knows whose call does not end.
    """
    shape, entropy = task["shape"], task["entropy"]
    hidden, weight, target, everything = draw(*shape, task["dtype"], task["ignored"])
    known = accuracy.statistics(hidden, weight, target)
    truths = {e: accuracy.truth(hidden, weight, target, e, known) for e in {False, entropy}}
    emit(reference=truths[entropy].reference, own=truths[entropy].own)
    calls, most = {"forward": {}, "both": {}}, {"forward": {}, "both": {}}
    chosen = functions(task)
    share = task["seconds"] / 2 / len(chosen)
    for name, function in chosen.items():
        emit(started=name)
        truth = truths[entropy and name not in baselines.NO_ENTROPY]
        try:
            errors, wrong = checked(name, function, (hidden, weight, target), entropy, truth)
        except Exception as error:  # a peer that cannot do this point is reported, not hidden
            emit(variant=name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        emit(variant=name, errors=errors, **({"failed": wrong} if wrong else {}))
        if wrong:
            continue
        targets = {name: target}
        if name == OURS and task["ignored"]:
            targets[NONE_IGNORED] = everything
        for label, of in targets.items():
            for mode, run in (("forward", forward), ("both", both)):
                call = partial(run, function, hidden, weight, of, entropy)
                emit(started=name)
                first = seconds(call)
                calls[mode][label] = partial(announced, emit, name, call)
                most[mode][label] = rounds_in(share, call, first, task["rounds"])
    for mode in calls:
        turns = (calls[mode], task["seconds"] / 2, 1, most[mode], task["pause"])
        emit(mode=mode, times=measure.take_turns(*turns))


def remembered(task, emit):
    """Extra bytes of one variant: the process's high-water mark during a call beyond what it held

    before with the inputs drawn, less outputs and gradients. A small call comes first, so that
    libraries and threads are loaded. Compiled variants run at full size first: their compiler is
    not what is asked for. What others keep after a call counts, as it would in a trainer.
    """
    (name, function), *_ = functions(task).items()
    tokens, width, vocab = task["shape"]
    entropy = task["entropy"]
    small = draw(min(tokens, 64), width, min(vocab, 1024), task["dtype"])[:3]
    inputs = draw(*task["shape"], task["dtype"], task["ignored"])[:3]
    for warm_up in (small, inputs) if name in baselines.COMPILED else (small,):
        forward(function, *warm_up, entropy)
        both(function, *warm_up, entropy)
    before, extra = measure.resident(), {}
    for mode, run in (("forward", forward), ("both", both)):
        measure.resident()
        peak, result = measure.peak_of(partial(run, function, *inputs, entropy))
        out, *gradients = result if mode == "both" else (result,)
        own = sum(t.numel() * t.element_size() for t in (*out.values(), *gradients))
        extra[mode] = max(0.0, (peak - before - own) / 2**20)
        del result, out, gradients
    emit(variant=name, extra_mb=extra)


def facts(task, emit):
    from fastrl.kernels import native

    emit(
        machine=measure.machine(),
        versions=baselines.versions(),
        isa=native.module().isa() if not native.why_missing else None,
        workspace_mb=workspace_mb(task),
        missing={n: why for n in task["variants"] if (why := baselines.missing(n))},
    )


def bound_memory():
    """Makes an allocation that would not fit fail here, before the kernel kills something."""
    data = measure._status("VmData")
    limit = data + int(0.95 * measure.available())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def main():
    task = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an event
    torch.set_num_threads(task["threads"])
    bound_memory()

    def emit(**event):
        print(json.dumps(event), file=events, flush=True)

    {"facts": facts, "time": timed, "memory": remembered}[task["what"]](task, emit)


if __name__ == "__main__":
    main()
