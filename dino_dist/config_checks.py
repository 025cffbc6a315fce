"""Which configs cannot work: values out of range, combinations that exclude each other, and worlds that do not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dino_dist.config import AugmentSection, Config, EvalSection, leaves
from dino_dist.durations import Duration
from dino_dist.errors import UserError


def check(config: Config) -> None:
    """Raise `UserError` for a value out of range or a combination that cannot work at any world size."""
    for key, value, limits in leaves(config):
        _check_leaf(key, value, limits)
    _check_sizes(config)
    if not config.data.train:
        raise UserError(
            "data.train is missing: give a folder of .tar shards, a pattern or a manifest (data.train=PATH)"
        )
    if (config.data.eval_train is None) != (config.data.eval_test is None):
        raise UserError("data.eval_train and data.eval_test go together: give both or neither")
    _check_stores(config)
    if config.head.batch_norm and config.train.accumulate > 1:
        raise UserError(
            f"head.batch_norm=true cannot go with train.accumulate={config.train.accumulate}: its statistics need the "
            "whole batch at once; set train.accumulate=1"
        )
    if config.train.accumulate > config.train.batch_size:
        raise UserError(
            f"train.accumulate={config.train.accumulate} is more than train.batch_size={config.train.batch_size} images"
        )


def check_for_world(config: Config, local_sizes: Sequence[int], local_ranks: Sequence[int] | None = None) -> None:
    """Raise `UserError` if the config cannot run on these ranks.

    `local_sizes`: of each rank, how many share its node; `local_ranks`: its number among them, where that is known.
    """
    size = len(local_sizes)
    parallel, batch_size = config.parallel, config.train.batch_size
    if size > batch_size:
        raise UserError(f"{size} ranks for train.batch_size={batch_size} images a step: use at most {batch_size} ranks")
    if batch_size // size < config.train.accumulate:
        raise UserError(
            f"train.accumulate={config.train.accumulate} needs as many images a rank, but {size} ranks share "
            f"train.batch_size={batch_size}: some get {batch_size // size}; accumulate less or use fewer ranks"
        )
    if parallel.strategy == "none" and size > 1:
        raise UserError(f"parallel.strategy=none is for one rank, not {size}: use fsdp, hsdp, ddp or oss")
    if parallel.strategy == "hsdp":
        if size == 1:
            raise UserError("parallel.strategy=hsdp needs at least two ranks: use fsdp or none on one")
        if parallel.replicate and size % parallel.replicate:
            raise UserError(f"parallel.replicate={parallel.replicate} does not divide {size} ranks into equal groups")
        if not parallel.replicate and (len(set(local_sizes)) > 1 or local_sizes[0] == size):
            nodes = "one node" if local_sizes[0] == size else "nodes with unequal numbers of ranks"
            raise UserError(f"parallel.strategy=hsdp on {nodes} needs parallel.replicate=N: the number of replicas")
        in_turn = local_ranks and [*local_ranks] != [rank % local_sizes[0] for rank in range(size)]
        if not parallel.replicate and in_turn:
            raise UserError(
                "parallel.strategy=hsdp shards among neighbouring ranks, which Slurm has dealt out to different nodes: "
                "start them with srun --distribution=block"
            )
    elif parallel.replicate:
        raise UserError(
            f"parallel.replicate={parallel.replicate} is for hsdp, not parallel.strategy={parallel.strategy}"
        )


def _check_leaf(key: str, value: Any, limits: dict[str, Any]) -> None:
    if value is None:
        return
    if limits.get("duration"):
        try:
            Duration.parse(value)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    if limits.get("interval") and not 0 < value[0] <= value[1]:
        raise UserError(f"{key}={list(value)}: give [smallest, largest] with 0 < smallest <= largest")
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        raise UserError(f"{key}={value} is out of range: give finite numbers")
    bounds = {name: limits[name] for name in ("at_least", "above", "at_most", "below") if limits.get(name) is not None}
    inside = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "below": lambda bound: value < bound,
        "at_most": lambda bound: value <= bound,
    }
    if not all(inside[name](bound) for name, bound in bounds.items()):
        allowed = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
        raise UserError(f"{key}={value} is out of range: it must be {allowed}")


def _check_sizes(config: Config) -> None:
    patch, augment = config.model.patch_size, config.augment
    for key, side in (
        ("augment.global_px", augment.global_px),
        ("augment.local_px", augment.local_px),
        ("eval.crop_px", config.eval.crop_px),
    ):
        if side % patch and (key != "augment.local_px" or augment.local_crops):
            near = max(patch, round(side / patch) * patch)
            raise UserError(f"model.patch_size={patch} does not divide {key}={side}: use {near}, for example")
    _check_blur(augment)
    if config.eval.crop_px > config.eval.resize_px:
        raise UserError(f"eval.crop_px={config.eval.crop_px} is larger than eval.resize_px={config.eval.resize_px}")
    for key in ("embed_dim", "depth", "num_heads"):
        value = getattr(config.model, key)
        if value is not None and value < 1:
            raise UserError(f"model.{key}={value} is out of range: it must be at least 1")
    _check_eval_lists(config.eval)
    if min(config.data.std) <= 0:
        raise UserError(f"data.std={list(config.data.std)} is out of range: each must be above 0")
    for key, interval in (("global_scale", augment.global_scale), ("local_scale", augment.local_scale)):
        if interval[1] > 1:
            raise UserError(f"augment.{key}={list(interval)}: a crop cannot cover more than 1.0 of the image")


def _check_eval_lists(section: EvalSection) -> None:
    """Everything that is tried in a list, one after the other."""
    if not section.knn_k or min(section.knn_k) < 1:
        raise UserError(f"eval.knn_k={list(section.knn_k)}: give one or more numbers of neighbours, each at least 1")
    if not section.linear_blocks or min(section.linear_blocks) < 1:
        raise UserError(
            f"eval.linear_blocks={list(section.linear_blocks)}: give one or more numbers of blocks, each at least 1"
        )
    if not section.linear_avgpool:
        raise UserError("eval.linear_avgpool=[]: give true, false or both")
    for key, values, may_be_empty in (
        ("knn_temperatures", section.knn_temperatures, True),
        ("linear_lr", section.linear_lr, False),
        ("logreg_C", section.logreg_C, False),
    ):
        if not all(0 < value < math.inf for value in values) or not (values or may_be_empty):
            least = "any number of" if may_be_empty else "one or more"
            raise UserError(f"eval.{key}={list(values)}: give {least} finite numbers above 0")


def _check_blur(augment: AugmentSection) -> None:
    """The filter of 9 taps reflects 4 px at each border, which a view must have beside the border pixel itself."""
    if augment.blur_filter != "taps9":
        return
    for key, side_px, blur_p in (
        ("global_px", augment.global_px, max(augment.blur_global_1_p, augment.blur_global_2_p)),
        ("local_px", augment.local_px, augment.blur_local_p if augment.local_crops else 0.0),
    ):
        if side_px <= 4 and blur_p > 0:
            raise UserError(
                f"augment.{key}={side_px} is too small for augment.blur_filter=taps9: use 5 px or more, or box3"
            )


def _check_stores(config: Config) -> None:
    """A store that fails for good must be told before the watchdog takes the wait for a hang."""
    data, limit_s = config.data, config.parallel.timeout_s
    specs = (data.train, data.eval_train, data.eval_test)
    # A shard that another process fetches into the cache is waited for as long as one request, then read all the same.
    longest_s = (data.store_attempts + (data.cache_dir is not None)) * data.store_timeout_s
    if longest_s >= limit_s and any("://" in spec for spec in specs if spec):
        waiting = " and a wait for the cache" if data.cache_dir is not None else ""
        raise UserError(
            f"data.store_attempts={data.store_attempts} requests of data.store_timeout_s={data.store_timeout_s:g} s"
            f"{waiting} may take {longest_s:g} s, but parallel.timeout_s={limit_s:g} s ends a rank that waits so long: "
            "lower the first two or raise the last"
        )
