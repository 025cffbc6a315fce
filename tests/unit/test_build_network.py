"""Settings that cannot go together are refused before anything is built, and networks are functions of the seed."""

from __future__ import annotations

import pytest
import torch

from dino_dist.build import attention_backend, build_network, check_strategy, compute_dtype
from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.errors import UserError

CPU = torch.device("cpu")


def config_with(*overrides: str) -> Config:
    sizes = ["model.embed_dim=24", "model.depth=2", "model.num_heads=2", "head.num_prototypes=11"]
    return load_config(None, ["data.train=x", *sizes, *overrides])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.compile=true", "parallel.activation_checkpointing=fairscale"], "train.compile"),
        (["train.precision=bf16", "parallel.strategy=oss", "parallel.activation_checkpointing=fairscale"], "bf16"),
        (["model.num_heads=5"], "model.num_heads=5"),
    ],
)
def test_what_excludes_each_other_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_strategy(config_with(*overrides), CPU)


def test_what_goes_together_is_not_refused() -> None:
    check_strategy(config_with("train.precision=bf16", "parallel.activation_checkpointing=fairscale"), CPU)
    check_strategy(config_with("train.compile=true", "parallel.activation_checkpointing=torch"), CPU)


def test_compiled_blocks_do_not_take_xformers() -> None:
    assert attention_backend(config_with("train.compile=true"), CPU).name == "sdpa"
    with pytest.raises(UserError, match="xformers"):
        attention_backend(config_with("train.compile=true", "model.attention=xformers"), CPU)


def test_auto_precision_on_a_cpu_is_fp32() -> None:
    assert compute_dtype(config_with(), CPU) == torch.float32
    assert compute_dtype(config_with("train.precision=bf16"), CPU) == torch.bfloat16


def test_weights_depend_on_the_seed_alone() -> None:
    first = build_network(config_with(), "sdpa", is_teacher=False, world_size=1).state_dict()
    torch.rand(3)  # the process's own generator plays no part
    again = build_network(config_with(), "sdpa", is_teacher=True, world_size=4).state_dict()
    other = build_network(config_with("run.seed=1"), "sdpa", is_teacher=False, world_size=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.pos_embed"], other["backbone.pos_embed"])
