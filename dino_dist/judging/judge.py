"""Judging a network by its features on labelled images: k-NN and logistic regression; on any number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.features import LabelledFeatures
from dino_dist.eval.knn import check_finite, check_labels, knn_accuracies
from dino_dist.eval.logreg import logistic_regression
from dino_dist.judging.classifier_crops import RandomCrops
from dino_dist.judging.evaluator import SPLITS, Evaluator, Forward, Tell, tell_nobody
from dino_dist.judging.judged_network import JudgedNetwork, together
from dino_dist.models.vit import VisionTransformer
from dino_dist.weights.network_weights import NetworkWeights

_NAMED_BAD = 3


@dataclass(frozen=True, kw_only=True)
class BadImages:
    """Those of a split that cannot be decoded."""

    count: int
    first: tuple[str, ...]
    """Of the first few: key and reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """A network and the labelled images that it is judged on, on each rank of a world."""

    config: Config
    world: World
    weights: NetworkWeights
    backbone: VisionTransformer
    evaluator: Evaluator
    tell: Tell

    def cls_features(self, split: str) -> LabelledFeatures:
        """The normed class tokens of the last block for each image of `train` or `test`; a collective."""
        return self.features(lambda images: self.backbone.features(images)[-1][:, 0], split)

    def features(self, forward: Forward, split: str, views: RandomCrops | None = None) -> LabelledFeatures:
        """What `forward` makes of each image (`views`: of random crops), in the network's type; a collective."""
        dtype = self.backbone.cls_token.dtype
        return self.evaluator.features(lambda images: forward(images.to(dtype)), split, views)

    def bad_images(self, split: str) -> BadImages:
        """Those of `train` or `test` that were found so far, on any rank; a collective."""
        records = self.evaluator.bad()[split]
        named = tuple(f"{record.key}: {record.reason}" for record in records[:_NAMED_BAD])
        return BadImages(count=len(records), first=named)

    def about(self, bad_train: BadImages | None = None) -> dict[str, Any]:
        """On what was judged, for a result, once all images were read; a collective.

        `bad_train`: what is known of the train images from an earlier call, where this one has not read them.
        """
        bad = {"train": bad_train or self.bad_images("train"), "test": self.bad_images("test")}
        labels = {split: self.evaluator.labels(split) for split in SPLITS}
        return {
            "classes": len(set(labels["train"].tolist())),
            "train_images": len(labels["train"]) - bad["train"].count,
            "test_images": len(labels["test"]) - bad["test"].count,
            "bad_images": sum(each.count for each in bad.values()),
            "first_bad_images": [line for each in bad.values() for line in each.first],
        }


def labelled_judge(judged: JudgedNetwork, tell: Tell = tell_nobody) -> Judge:
    """Open data.eval_train and data.eval_test for a network; a collective.

    `UserError` on all ranks if they are not given, have labels that cannot be used, or images are cut to no whole
    number of the network's patches.
    """
    config, world = judged.config, judged.world
    together(world, partial(_check, config, judged.weights))
    evaluator = Evaluator(config, world, judged.index_dir, tell=tell)

    def check() -> None:
        check_labels(evaluator.labels("train"), "train")
        check_labels(evaluator.labels("test"), "test", one_class_is_fine=True)

    world.first(check)
    return Judge(
        config=config,
        world=world,
        weights=judged.weights,
        backbone=judged.backbone,
        evaluator=evaluator,
        tell=tell,
    )


def check_usable(world: World, *, train: LabelledFeatures, test: LabelledFeatures) -> None:
    """`UserError` on all ranks, said once, if features are not finite, or the images that could be decoded are of one
    class. A collective.
    """

    def check() -> None:
        for which, features in (("train", train), ("test", test)):
            check_finite(features.features_ND, which)
        check_labels(train.labels_N, "train")

    world.first(check)


def judge_knn(judge: Judge) -> dict[str, Any]:
    """Accuracies for each k and each temperature; `knn_top1_k20` and its like are those at eval.knn_temperature."""
    section = judge.config.eval
    train, test = judge.cls_features("train"), judge.cls_features("test")
    check_usable(judge.world, train=train, test=test)
    results = knn_accuracies(
        train.features_ND,
        train.labels_N,
        test.features_ND,
        test.labels_N,
        k=section.knn_k,
        temperatures=(section.knn_temperature, *section.knn_temperatures),
        world=judge.world,
    )
    named: dict[str, float] = {}
    for result in results[: len(set(section.knn_k))]:
        named |= {f"knn_top1_k{result.k}": result.top1, f"knn_top5_k{result.k}": result.top5}
    return judge.about() | named | {"results": [asdict(result) for result in results]}


def judge_logreg(judge: Judge) -> dict[str, Any]:
    """Logistic regression on class tokens of length 1; the best of eval.logreg_C on a tenth of the train images."""
    section = judge.config.eval
    train, test = judge.cls_features("train"), judge.cls_features("test")
    check_usable(judge.world, train=train, test=test)
    fit = partial(
        logistic_regression,
        train.features_ND,
        train.labels_N,
        test.features_ND,
        test.labels_N,
        strengths=section.logreg_C,
        seed=judge.config.run.seed,
        world=judge.world,
        tell=lambda done, total: judge.tell("fits", done, total),
    )
    result = together(judge.world, fit)  # what it refuses, it refuses on all ranks alike
    fields = asdict(result)
    results = fields.pop("tried")
    return judge.about() | {f"logreg_{name}": value for name, value in fields.items()} | {"results": results}


def _check(config: Config, weights: NetworkWeights) -> None:
    if config.data.eval_train is None:
        raise UserError(
            "labelled images are needed: give data.eval_train=PATH data.eval_test=PATH, each a folder of shards, or a "
            "folder with a sub-folder of images for each class"
        )
    patch, crop_px = weights.shape.patch_size, config.eval.crop_px
    if crop_px % patch:
        near = max(patch, round(crop_px / patch) * patch)
        raise UserError(f"eval.crop_px={crop_px} is no multiple of the network's patches of {patch} px: use {near}")
