"""What ranks tell each other and the watchdog costs a step neither a collective nor a wait for the device."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dino_dist
from dino_dist.config_file import load_config
from dino_dist.dist import ProcessEnvironment, World
from dino_dist.liveness import Pulse
from dino_dist.preemption import StopSignals
from dino_dist.resume import restore
from dino_dist.run import build_run, loader
from dino_dist.run_session import open_session
from dino_dist.step import DinoStep
from dino_dist.train import loop, watchdog

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


class Costs(TorchDispatchMode):
    """Collectives and synchronisations of this thread, inside and outside of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.steps: list[Counter[str]] = []
        self.outside: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d") or name.split(".")[0] in SYNCS:
            (self.steps[-1] if self.inside else self.outside)[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Framed:
    """A step that tells the counter when it begins and ends."""

    def __init__(self, step: DinoStep, costs: Costs) -> None:
        self._step, self._costs = step, costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, *args: Any) -> Any:
        self._costs.inside = True
        self._costs.steps.append(Counter())
        try:
            return self._step(*args)
        finally:
            self._costs.inside = False


def count(world: World, settings: list[str]) -> dict[str, Any]:
    """The costs of a run's first steps, as the loop runs them, and of a step that carries no flags."""
    config = load_config(settings[0], settings[1:])
    pulse, signals, costs = Pulse(), StopSignals(), Costs()
    with (
        open_session(config, world, ProcessEnvironment(), accept_changes=False) as session,
        watchdog(world, config, pulse, session),
    ):
        run = build_run(config, world, session, signals, pulse)
        restore(run)
        with closing(run.checkpointer), closing(run.monitor), closing(loader(run)) as batches:
            (batch,) = next(batches)
            views = run.render(batch)
        with closing(loader(run)) as batches:
            step, run.step = run.step, Framed(step=run.step, costs=costs)  # type: ignore[assignment]
            with costs:
                steps_done = run_five_steps(run, batches)
            bare = Costs()
            with bare:
                Framed(step, bare)([lambda: views], run.schedules.at(run.steps_done), torch.zeros(0))
    return {"steps": costs.steps, "outside": costs.outside, "bare": bare.steps[0], "steps_done": steps_done}


def run_five_steps(run: Any, batches: Any) -> int:
    """Run the loop until its data ends, long before a step on which it would log."""

    class Enough(Exception):
        pass

    def five() -> Any:
        for _ in range(5):
            yield next(batches)
        raise Enough

    with pytest.raises(Enough):
        loop(run, five())
    return int(run.steps_done)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_step_with_agreement_costs_what_one_without_costs(
    ranks: Callable[..., list[Any]], tiny: Callable[..., list[str]], tmp_path: Path, strategy: str
) -> None:
    never = ["metrics.every=1000st", "eval.knn_every=1000st", "checkpoint.every=1000st", "train.length=100st"]
    settings = tiny(tmp_path / "run", f"parallel.strategy={strategy}", *never)
    for counted in ranks(2, count, settings):
        assert counted["steps_done"] == 5
        assert counted["outside"] == {}, "the loop around the step communicates or waits"
        for step in counted["steps"]:
            assert step == counted["bare"], "the flags cost a collective of their own"
        assert any(name.startswith("c10d") for name in counted["bare"]), "the counter sees no collective at all"
        assert not set(counted["bare"]) & set(SYNCS)


def test_the_watchdog_knows_the_store_alone() -> None:
    """No collective can hide in its threads: the process groups are out of its reach."""
    for name in ("watchdog", "liveness", "stacks"):
        tree = ast.parse((Path(dino_dist.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        imported = {
            (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        } | {(alias.name, "") for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        of_torch = {(module, what) for module, what in imported if (module or "").startswith("torch")}
        assert of_torch <= {("torch.distributed", "Store"), ("torch.distributed", "DistStoreError")}, name
