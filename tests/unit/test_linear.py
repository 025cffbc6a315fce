"""Linear classifiers reach what scikit-learn's logistic regression reaches, and learning rates do not mix."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dino_dist.errors import UserError
from dino_dist.eval.linear import Columns, Recipe, accuracies, new_group, stacked_features, train_epoch
from dino_dist.eval.linear_state import load_group, make_folder, save_group
from dino_dist.eval.logreg import logistic_regression

ALL = Columns(blocks=1, avgpool=True)


def digit_features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 random nonlinear features of scikit-learn's digits, too few for a perfect score; 1,437 to train on."""
    digits = load_digits()
    mix = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) / 8
    features = F.gelu(torch.from_numpy(digits.data).float() / 4 @ mix)
    labels = torch.from_numpy(digits.target)
    return features[:1437], labels[:1437], features[1437:], labels[1437:]


def test_within_a_point_of_logistic_regression_on_the_same_features() -> None:
    train, labels, test, test_labels = digit_features()
    reference = LogisticRegression(max_iter=2000).fit(train.numpy(), labels.numpy())
    expected = float((reference.predict(test.numpy()) == test_labels.numpy()).mean())
    recipe = Recipe(rates=(0.02, 0.05, 0.1, 0.2, 0.5), epochs=348, batch_size=144, seed=0)
    group = new_group(ALL, recipe, num_features=24, num_classes=10, like=train)
    for _ in range(recipe.epochs):
        train_epoch(group, train, labels, recipe)
    best = max(top1 for top1, _ in accuracies(group, test, test_labels))
    assert 0.75 < expected < 0.95, "the features tell something, and not everything"
    assert abs(best - expected) <= 0.01


def test_a_step_is_that_of_torchs_optimizer() -> None:
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(37, 5, generator=generator).double(), torch.randint(0, 3, (37,), generator=generator)
    recipe = Recipe(rates=(0.1, 3.0), epochs=4, batch_size=37, seed=2)
    group = new_group(ALL, recipe, num_features=5, num_classes=3, like=features)
    layers = [torch.nn.Linear(5, 3, dtype=torch.float64) for _ in recipe.rates]
    for layer, weight in zip(layers, group.weight_RCD, strict=True):
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.zero_()
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=rate * 37 / 256, momentum=0.9)
        for layer, rate in zip(layers, recipe.rates, strict=True)
    ]
    for epoch in range(recipe.epochs):
        train_epoch(group, features, labels, recipe)
        for layer, optimizer, rate in zip(layers, optimizers, recipe.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * 37 / 256 * 0.5 * (1 + np.cos(np.pi * epoch / 4))
            optimizer.zero_grad()
            F.cross_entropy(layer(features), labels).backward()
            optimizer.step()
    for index, layer in enumerate(layers):
        torch.testing.assert_close(group.weight_RCD[index], layer.weight.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(group.bias_RC[index], layer.bias.detach(), rtol=1e-10, atol=1e-12)


def test_columns_are_those_of_the_published_protocol() -> None:
    tokens = [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    stored = stacked_features(tokens)
    cls, patches = [block[:, 0] for block in tokens], tokens[-1][:, 1:].mean(1)
    assert torch.equal(Columns(blocks=4, avgpool=False).of(stored, embed_dim=3), torch.cat(cls, 1))
    assert torch.equal(Columns(blocks=1, avgpool=True).of(stored, embed_dim=3), torch.cat([cls[-1], patches], 1))
    assert torch.equal(Columns(blocks=2, avgpool=True).of(stored, embed_dim=3), torch.cat([*cls[2:], patches], 1))


def test_a_rate_that_diverges_scores_nothing_and_harms_no_other() -> None:
    train, labels, test, test_labels = digit_features()
    group = new_group(
        ALL, recipe := Recipe(rates=(0.1, 1e38), epochs=3, batch_size=144, seed=0), num_features=24, num_classes=10,
        like=train,
    )  # fmt: skip
    alone = new_group(
        ALL, one := Recipe(rates=(0.1,), epochs=3, batch_size=144, seed=0), num_features=24, num_classes=10, like=train
    )
    for _ in range(3):
        train_epoch(group, train, labels, recipe)
        train_epoch(alone, train, labels, one)
    good, bad = accuracies(group, test, test_labels)
    assert bad == (0.0, 0.0)
    assert good[0] == pytest.approx(accuracies(alone, test, test_labels)[0][0], abs=0.01)


def test_a_class_that_was_not_trained_is_never_right() -> None:
    train, *_ = digit_features()
    recipe = Recipe(rates=(0.1,), epochs=1, batch_size=144, seed=0)
    group = new_group(ALL, recipe, num_features=24, num_classes=10, like=train)
    assert accuracies(group, train[:7], torch.full((7,), -1)) == [(0.0, 0.0)]


def test_a_state_of_other_settings_is_not_taken_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    recipe = Recipe(rates=(0.1,), epochs=2, batch_size=8, seed=0)
    like = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    group = new_group(ALL, recipe, num_features=4, num_classes=2, like=like)
    make_folder(tmp_path / "state")
    assert load_group(tmp_path / "state", group, "a") is None
    train_epoch(group, like, torch.arange(20) % 2, recipe)
    save_group(tmp_path / "state", group, "a", {"count": 3})
    other = new_group(ALL, recipe, num_features=4, num_classes=2, like=like)
    assert load_group(tmp_path / "state", other, "b") is None
    assert other.epochs_done == 0
    assert load_group(tmp_path / "state", other, "a") == {"count": 3}
    assert other.epochs_done == 1
    assert torch.equal(other.weight_RCD, group.weight_RCD)
    save_group(tmp_path / "state", new_group(ALL, recipe, num_features=4, num_classes=2, like=like), "b", {})
    assert load_group(tmp_path / "state", group, "a"), "what another sweep saves there replaces nothing"
    assert torch.equal(other.weight_RCD, group.weight_RCD)
    (tmp_path / "state" / "linear-last1-avgpool-a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"linear-last1-avgpool-a.safetensors is no state of a sweep"):
        load_group(tmp_path / "state", other, "a")
    with pytest.raises(UserError, match=r"below cannot hold the sweep's state \(.*with --out"):
        make_folder(tmp_path / "state" / "linear-last1-avgpool-a.safetensors" / "below")


def test_logistic_regression_chooses_on_a_held_out_tenth() -> None:
    train, labels, test, test_labels = digit_features()
    result = logistic_regression(
        train[:600], labels[:600], test, test_labels, strengths=[1e3, 1e-6, 1.0], max_iterations=200, seed=0
    )
    assert [one.C for one in result.tried] == [1e-6, 1.0, 1e3]
    assert result.C == max(result.tried, key=lambda one: one.held_out_top1).C != 1e-6
    unit = F.normalize(train[:600], dim=1).numpy()
    reference = LogisticRegression(C=result.C, max_iter=200).fit(unit, labels[:600].numpy())
    right = reference.predict(F.normalize(test, dim=1).numpy()) == test_labels.numpy()
    assert result.top1 == float(right.mean())
    assert result.top1 <= result.top5 <= 1.0


def test_a_fit_that_has_not_converged_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, test_labels = digit_features()

    def converged(max_iterations: int) -> list[bool]:
        result = logistic_regression(
            train, labels, test, test_labels, strengths=[1e-6, 1e4], max_iterations=max_iterations, seed=0
        )
        return [one.converged for one in result.tried]

    assert converged(2) == [False, False]
    assert converged(5000) == [True, True]
    fit = LogisticRegression.fit

    def gives_up(self: LogisticRegression, *arguments: Any) -> LogisticRegression:
        warnings.warn("ABNORMAL_TERMINATION_IN_LNSRCH", ConvergenceWarning, stacklevel=1)
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", gives_up)
    assert converged(5000) == [False, False]


def test_logistic_regression_of_two_classes_and_what_it_refuses() -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(40) % 2 * 7
    features = torch.randn(40, 3, generator=generator) + labels[:, None]
    result = logistic_regression(features, labels, features[:1], labels[:1], strengths=[1.0], max_iterations=99, seed=0)
    assert (result.top1, result.top5, result.tried) == (1.0, 1.0, ())
    with pytest.raises(UserError, match="all 40 train images have label 3"):
        logistic_regression(features, torch.full((40,), 3), features, labels, strengths=[1.0], max_iterations=9, seed=0)
    with pytest.raises(UserError, match="2 train images are too few to choose from"):
        logistic_regression(features[:2], labels[:2], features, labels, strengths=[1.0, 2.0], max_iterations=9, seed=0)
