"""Settings: what is refused, in which words, and what is read, merged, saved and compared."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

from dino_dist.config import Config, DataSection, leaves
from dino_dist.config_checks import check, check_for_world
from dino_dist.config_file import differences, load_config, recipe_names, to_plain, to_yaml
from dino_dist.errors import UserError

TRAIN = "data.train=shards"


def refusal(*overrides: str, name: str | None = None) -> str:
    """The one line that refuses these overrides."""
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    text = str(caught.value)
    assert "\n" not in text, text
    return text


def test_defaults_need_only_the_data() -> None:
    assert load_config(None, [TRAIN]) == Config(data=DataSection(train="shards"))
    assert "data.train" in refusal()


def test_settings_cannot_be_changed_in_place() -> None:
    config = load_config(None, [TRAIN])
    with pytest.raises(FrozenInstanceError):
        config.train.batch_size = 3  # type: ignore[misc]


def out_of_range() -> list[tuple[str, str]]:
    """For every bounded setting, a value just outside each of its limits."""
    cases = []
    for key, default, limits in leaves(Config()):
        step = 1 if isinstance(default, int) else 1e-3
        if limits.get("at_least") is not None:
            cases.append((key, str(limits["at_least"] - step)))
        if limits.get("above") is not None:
            cases.append((key, str(limits["above"])))
        if limits.get("at_most") is not None:
            cases.append((key, str(limits["at_most"] + step)))
        if isinstance(default, float) and limits:
            cases += [(key, ".nan"), (key, ".inf"), (key, "1e400")]
        if limits.get("duration"):
            cases += [(key, value) for value in ("10 epochs", "-5st", "ten", "''", "1e3st")]
        if limits.get("interval"):
            cases += [(key, value) for value in ("[0.5,0.2]", "[0.0,0.5]", "[-1.0,0.5]", "[.nan,0.5]")]
    return cases


@pytest.mark.parametrize(("key", "value"), out_of_range())
def test_a_value_out_of_range_names_its_key(key: str, value: str) -> None:
    message = refusal(TRAIN, f"{key}={value}")
    assert key in message, message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.arch=vit_huge", "vit_large"),
        ("model.attention=flash", "xformers"),
        ("optim.name=adam", "lars"),
        ("optim.clip_scope=all", "global"),
        ("train.precision=fp8", "bf16"),
        ("train.device=tpu", "cuda"),
        ("parallel.strategy=zero3", "hsdp"),
        ("parallel.activation_checkpointing=full", "fairscale_offload"),
    ],
)
def test_an_unknown_choice_names_the_choices(override: str, expected: str) -> None:
    message = refusal(TRAIN, override)
    assert expected in message, message
    assert override.split("=")[1] in message, message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.batch_size=many", "batch_size"),
        ("train.batch_size=2.5", "batch_size"),
        ("train.compile=perhaps", "compile"),
        ("optim.lr=fast", "lr"),
        ("augment.global_scale=[0.1,0.5,1.0]", "global_scale"),
        ("augment.global_scale=0.5", "global_scale"),
        ("data.mean=[0.1,0.2]", "mean"),
        ("eval.knn_k=[a]", "knn_k"),
        ("train=5", "train"),
        ("train=", "train"),
        ("run.dir=\n", "run.dir"),
        ("optim.lr={a: 1}", "lr"),
        ("train.batch_size=null", "batch_size"),
    ],
)
def test_a_value_of_another_type_names_its_key(override: str, named: str) -> None:
    assert named in refusal(TRAIN, override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.patch_size=15"], "augment.global_px=224"),
        (["model.patch_size=14"], "augment.local_px=96"),
        (["augment.global_px=100"], "augment.global_px=100"),
        (["augment.local_px=100"], "augment.local_px=100"),
        (["eval.crop_px=200"], "eval.crop_px=200"),
        (["eval.crop_px=512"], "eval.resize_px"),
        (["data.eval_train=shards"], "data.eval_test"),
        (["data.eval_test=shards"], "data.eval_train"),
        (["head.batch_norm=true", "train.accumulate=2"], "train.accumulate=2"),
        (["train.batch_size=4", "train.accumulate=5"], "train.accumulate=5"),
        (["model.depth=0"], "model.depth=0"),
        (["model.num_heads=-1"], "model.num_heads=-1"),
        (["eval.knn_k=[]"], "eval.knn_k"),
        (["eval.knn_k=[10,0]"], "eval.knn_k"),
        (["augment.global_scale=[0.4,1.5]"], "augment.global_scale"),
        (["augment.preset=dinov3", "augment.local_px=4", "model.patch_size=4"], "augment.local_px=4"),
        (["augment=[1]"], "augment"),
        (["data.train=s3://bucket/x", "parallel.timeout_s=200"], "data.store_timeout_s=30"),
        (["data.train=s3://bucket/x", "data.cache_dir=c", "parallel.timeout_s=270"], "and a wait for the cache may"),
        (["augment.preset=[dinov3]"], "dinov2_as_trained"),
        (["augment.local_scale=[0.4,1.5]"], "augment.local_scale"),
        (["augment.blur_sigma_px=[0.1,.inf]"], "augment.blur_sigma_px"),
        (["data.mean=[.nan,0.5,0.5]"], "data.mean"),
        (["data.std=[0.2,0.0,0.2]"], "data.std"),
    ],
)
def test_a_combination_that_cannot_work_is_named(overrides: list[str], named: str) -> None:
    assert named in refusal(TRAIN, *overrides)


def test_local_crops_that_are_not_made_may_have_any_size() -> None:
    assert load_config(None, [TRAIN, "augment.local_crops=0", "augment.local_px=97"]).augment.local_px == 97


@pytest.mark.parametrize(
    ("overrides", "size", "named"),
    [
        (["train.batch_size=4"], 5, "train.batch_size=4"),
        (["train.batch_size=10", "train.accumulate=3"], 4, "train.accumulate=3"),
        (["parallel.strategy=none"], 2, "parallel.strategy=none"),
        (["parallel.strategy=hsdp"], 1, "parallel.strategy=hsdp"),
        (["parallel.strategy=hsdp", "parallel.replicate=3"], 4, "parallel.replicate=3"),
        (["parallel.strategy=ddp", "parallel.replicate=2"], 4, "parallel.replicate=2"),
    ],
)
def test_a_world_that_cannot_work_is_named(overrides: list[str], size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_for_world(load_config(None, [TRAIN, *overrides]), [1] * size)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_any_number_of_ranks_up_to_the_batch_size_works(size: int) -> None:
    check_for_world(load_config(None, [TRAIN, "train.batch_size=64"]), [size] * size)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.batchsize", "train.batch_size"),
        ("trian.batch_size", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("optim.weight_decy", "optim.weight_decay"),
        ("head.prototypes", "head.num_prototypes"),
        ("parallel.sharding", "sharding"),
        ("train.batch_size.more", "train"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(typed: str, meant: str) -> None:
    message = refusal(TRAIN, f"{typed}=1")
    assert typed.split(".")[-1] in message, message
    assert meant in message, message


@pytest.mark.parametrize("text", ["train.batch_size", "=5", "", " =5", "a: b", "train.batch_size=[1", "train..x=1"])
def test_what_is_not_an_override_is_refused(text: str) -> None:
    refusal(TRAIN, text)


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "${train.length}", "x${oc.env:HOME}y", "[${oc.env:HOME}]", "${", "{${a}: 1}"]
)
def test_nothing_is_expanded(value: str, tmp_path: Path) -> None:
    refusal(f"data.train={value}")
    file = tmp_path / "a.yaml"
    for text in (f"data:\n  train: '{value}'\n", f"augment:\n  preset: '{value}'\n", f"augment: '{value}'\n"):
        file.write_text(text)
        refusal(name=str(file))
    refusal(TRAIN, f"augment.preset={value}")
    refusal(TRAIN, f"augment={value}")


def test_later_sources_win_and_types_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: here}\ntrain: {batch_size: 8, length: 5}\noptim: {lr: 1}\neval: {knn_k: [3, 5]}\n")
    config = load_config(str(file), ["train.batch_size=16", "train.batch_size=32", "metrics.profile_at=5st"])
    assert (config.train.batch_size, config.train.length, config.metrics.profile_at) == (32, "5", "5st")
    assert isinstance(config.optim.lr, float)
    assert config.eval.knn_k == (3, 5)
    assert load_config(str(file), ["metrics.profile_at=null"]).metrics.profile_at is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_the_defaults(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert load_config(str(file), [TRAIN]) == load_config(None, [TRAIN])


@pytest.mark.parametrize(
    "text", ["- 1\n", "5", "just words", "a: [1", "? {a: 1}\n: 2\n", "!!python/object:os.system {}"]
)
def test_a_file_that_holds_no_settings_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    refusal(TRAIN, name=str(file))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "absent.yaml" in refusal(name=str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00train")
    assert "binary.yaml" in refusal(name=str(tmp_path / "binary.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refusal(name=str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_the_saved_form_reads_back_equal(name: str | None, tmp_path: Path) -> None:
    config = load_config(name, [TRAIN, "run.seed=17", "optim.lr=0.1234567890123456789", "data.eval_train=null"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(str(file))
    assert again == config
    assert differences(to_plain(config), again) == ([], [])


def test_the_saved_form_holds_plain_values_only() -> None:
    plain = to_plain(load_config(None, [TRAIN]))
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


@pytest.mark.parametrize(
    ("override", "may_change"),
    [
        ("run.dir=elsewhere", True),
        ("data.num_workers=9", True),
        ("data.buffer_mib=9", True),
        ("data.cache_dir=/local", True),
        ("data.store_attempts=9", True),
        ("train.accumulate=2", True),
        ("checkpoint.every=7st", True),
        ("metrics.every=7st", True),
        ("eval.knn_k=[7]", True),
        ("parallel.strategy=ddp", True),
        ("run.seed=9", False),
        ("data.train=other", False),
        ("data.shards_per_block=9", False),
        ("model.drop_path=0.2", False),
        ("head.batch_norm=true", False),
        ("augment.global_scale=[0.3,1.0]", False),
        ("augment.quantize=uint8", False),
        ("data.dct_scale_min_px=224", False),
        ("loss.teacher_temp=0.05", False),
        ("train.length=9ep", False),
        ("train.batch_size=9", False),
        ("optim.lr=0.9", False),
        ("ema.momentum=0.9", False),
    ],
)
def test_a_resumed_run_may_change_only_what_changes_no_result(override: str, may_change: bool) -> None:
    saved = to_plain(load_config(None, [TRAIN]))
    refused, allowed = differences(saved, load_config(None, [TRAIN, override]))
    key = override.split("=")[0]
    (line,) = allowed if may_change else refused
    assert line.startswith(f"{key}: "), line
    assert not (refused if may_change else allowed)


def test_a_setting_that_an_older_run_did_not_have_is_a_difference() -> None:
    config = load_config(None, [TRAIN])
    saved = to_plain(config)
    del saved["loss"]
    del saved["metrics"]["every"]
    refused, allowed = differences(saved, config)
    assert all("absent" in line and line.startswith("loss.") for line in refused)
    assert len(refused) == len(to_plain(config)["loss"])
    assert [line.split(":")[0] for line in allowed] == ["metrics.every"]


def test_a_config_made_in_code_is_checked_alike() -> None:
    config = Config(data=DataSection(train="shards"))
    check(config)
    with pytest.raises(UserError, match=r"optim\.lr"):
        check(replace(config, optim=replace(config.optim, lr=float("nan"))))


@pytest.mark.parametrize("local_sizes", [[2, 2], [2, 2, 1]], ids=["one node", "unequal nodes"])
def test_hsdp_needs_to_know_its_replicas_where_nodes_do_not_tell(local_sizes: list[int]) -> None:
    with pytest.raises(UserError, match=r"parallel\.replicate=N"):
        check_for_world(load_config(None, [TRAIN, "parallel.strategy=hsdp"]), local_sizes)


def test_hsdp_takes_a_replica_a_node() -> None:
    check_for_world(load_config(None, [TRAIN, "parallel.strategy=hsdp"]), [2, 2, 2, 2])


def test_hsdp_needs_neighbouring_ranks_on_one_node() -> None:
    config = load_config(None, [TRAIN, "parallel.strategy=hsdp"])
    check_for_world(config, [2, 2, 2, 2], [0, 1, 0, 1])
    with pytest.raises(UserError, match="--distribution=block"):
        check_for_world(config, [2, 2, 2, 2], [0, 0, 1, 1])
