"""A stage's beginning and end: networks, frozen policies, optimizers; what is written at last."""

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fastrl import models
from fastrl.files import write_folder
from fastrl.train import checkpoints, parallel
from fastrl.train.algorithms import Context, stream_seed
from fastrl.train.config import Config
from fastrl.train.optimizer import Optimizer
from fastrl.train.setup import Setup, add_likelihood, add_scorer, load_policy, padding
from fastrl.train.stages import Distillation, Stage


@dataclass
class Work:
    """A stage under way: what its algorithm sees, and the optimizers of the networks it trains."""

    context: Context
    optimizers: dict[str, Optimizer]

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds: all that training changed, by network."""
        setup, reference = self.context.setup, self.context.reference
        out = {name: checkpoints.trainable(n) for name, n in setup.networks.items()}
        if reference is not None and getattr(self.context.stage, "reference_every", None):
            out["reference"] = like_policy(reference, setup.policy)
        return out


def begin(setup: Setup, stage: Stage, name: str, folder: Path, checkpoint: Path | None) -> Work:
    """A stage's networks, frozen policies and optimizers, new or as a checkpoint left them."""
    seed = stream_seed(setup.config.seed, name)
    if checkpoint is None:
        add_scorers(setup, stage)
        if stage.reference or name in _needed_later(setup.config):
            weights = parallel.collect(checkpoints.trainable(setup.policy))

            def fill(path: Path) -> None:
                checkpoints.save_weights(weights, path / "policy.safetensors")

            parallel.first(lambda: write_folder(folder / f"begin-{name}", fill))
    reference = earlier = None
    if isinstance(stage, Distillation) and stage.teacher is not None:
        teacher: nn.Module = models.load_model(stage.teacher)
        reference = parallel.distribute(_frozen(teacher.to(setup.device)), setup.config.parallel)
    elif stage.reference:
        reference = _as_it_was(setup, folder, name)
    origin = _earlier(setup.config, name)
    if origin is not None:
        earlier = _as_it_was(setup, folder, origin)
    if checkpoint is None and isinstance(stage, Distillation) and stage.teacher is None:
        fresh = checkpoints.trainable(load_policy(setup.config, setup.tokenizer, setup.device))
        for key, parameter in checkpoints.trainable(setup.policy).items():
            parameter.copy_(parallel.like(fresh[key], parameter))
        setup.engine.weights_changed()
    optimizers = {}
    for network in [*(["policy"] if stage.trains_policy else []), *stage.scorers]:
        settings = getattr(stage, f"{network}_optimizer", stage.optimizer)
        optimizers[network] = Optimizer(setup.networks[network], settings, stage.steps)
    if checkpoint is not None:
        for network, optimizer in optimizers.items():
            checkpoints.load_optimizer(checkpoint, network, optimizer)
        refreshed = checkpoint / "reference.safetensors"
        if reference is not None and refreshed.is_file():
            checkpoints.load_weights(like_policy(reference, setup.policy), refreshed)
    scored_with = _scored_with(setup, folder, name, reference)
    return Work(Context(setup, stage, seed, reference, earlier, scored_with), optimizers)


def add_scorers(setup: Setup, stage: Stage) -> None:
    """The scoring models that a stage trains, where an earlier one has not made them."""
    for network, heads in stage.scorers.items():
        if network in setup.networks:
            continue
        seed = stream_seed(setup.config.seed, network)
        if stage.scorer_kind == "head":
            setup.networks[network] = models.ScoreHead(setup.policy, heads, seed)
        elif stage.scorer_kind == "likelihood":
            add_likelihood(setup, network)
        else:
            add_scorer(setup, network, heads, seed)


def _earlier(config: Config, name: str) -> str | None:
    """The stage at whose beginning the policy is needed in this one."""
    stage = config.stages[name]
    return stage.earlier or next(iter(config.stages)) if stage.needs_earlier else None


def _needed_later(config: Config) -> set[str | None]:
    stages = config.stages.items()
    read = {
        name
        for name, stage in stages
        if stage.scorer_kind != "separate" and not stage.trains_policy
    }
    return read | {_earlier(config, name) for name in config.stages}


def _trainer(config: Config, network: str, before: str | None = None) -> str:
    """The stage that trains a scoring model last, before another stage if one is given."""
    names = list(config.stages)
    end = len(names) if before is None else names.index(before)
    return next(n for n in reversed(names[:end]) if network in config.stages[n].scorers)


def _scored_with(
    setup: Setup, folder: Path, name: str, reference: nn.Module | None
) -> nn.Module | None:
    """The policy that the scoring model reads that a stage's rewards come from, if it reads one.

    It is the reference, if there is one and no stage between the two has changed the policy.
    """
    stages = setup.config.stages
    source = stages[name].reward_from or "functions"
    if source == "functions":
        return None
    trainer, names = _trainer(setup.config, source, name), list(stages)
    if stages[trainer].scorer_kind == "separate":
        return None
    between = names[names.index(trainer) : names.index(name)]
    if reference is not None and not any(stages[n].trains_policy for n in between):
        return reference
    return _as_it_was(setup, folder, trainer)


def _as_it_was(setup: Setup, folder: Path, name: str) -> nn.Module:
    """A frozen copy of the policy as it was when a stage began.

    Parameters that never train are shared, unless each process has only a part of them.
    """
    setup.policy.zero_grad()  # gradients would be copied along
    with parallel.whole(setup.policy) as policy:
        frozen = (p for p in policy.parameters() if not p.requires_grad)
        kept = {id(p): p for p in frozen if policy is setup.policy}
        model = copy.deepcopy(policy, kept)
    path = folder / f"begin-{name}" / "policy.safetensors"
    checkpoints.load_weights(checkpoints.trainable(model), path)
    return parallel.distribute(_frozen(model), setup.config.parallel)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def like_policy(model: nn.Module, policy: nn.Module) -> dict[str, Tensor]:
    """The parameters of a copy of the policy that are trained in the policy."""
    names = checkpoints.trainable(policy).keys()
    return {n: p.detach() for n, p in model.named_parameters() if n in names}


def save_final(setup: Setup, name: str, network: nn.Module, run: Path) -> None:
    """Write `final/`, or `final-NAME/` of a scoring model, in Hugging Face format.

    A head that reads the policy as it is at the end is written alone; of a reward model's head the
    classifier that it makes with the policy that it reads.
    """
    folder = checkpoints.final(run, name)
    if isinstance(network, models.ScoreHead):
        trainer = _trainer(setup.config, name)
        if not setup.config.stages[trainer].trains_policy:
            with parallel.whole(_as_it_was(setup, run, trainer)) as model:
                network = models.join_head(model, network, padding(setup))
    with parallel.whole(network) as model:

        def fill(path: Path) -> None:
            if isinstance(model, models.ScoreHead):
                checkpoints.save_weights(checkpoints.trainable(model), path / "model.safetensors")
            else:
                models.save_pretrained(model, setup.tokenizer, path)

        parallel.first(lambda: write_folder(folder, fill))
