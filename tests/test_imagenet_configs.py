"""The configs for ImageNet: what they name exists, and their networks have the published sizes at 224x224."""

from dataclasses import replace
from pathlib import Path

import pytest

from bnn_jax.analysis.accounting import account_model
from bnn_jax.analysis.published_sizes import TABLE, counted_as
from bnn_jax.errors import UsageError
from bnn_jax.stages.recipes import RECIPES
from bnn_jax.stages.stage import check_stages
from bnn_jax.training.config import Config, DataConfig, from_dict, load_config, to_dict
from bnn_jax.training.validation import validate

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = {row.name: row for row in TABLE}
ROWS = {
    "imagenet_bireal_resnet18": "Bi-Real ResNet18",
    "imagenet_reactnet_resnet18": "ReActNet-ResNet18",
    "imagenet_igp_resnet37_41": "IGP-ResNet37(41)",
}


def load(name):
    return validate(load_config(CONFIGS / f"{name}.py"))


def account_of(config):
    return account_model(config.model.name, (224, 224, 3), num_classes=1000, **settings_of(config))


def settings_of(config):
    return {key: value for key, value in vars(config.model).items() if key != "name"}


def test_every_config_for_imagenet_is_known_here():
    assert {path.stem for path in CONFIGS.glob("imagenet_*.py")} == {*ROWS, "imagenet_xnor_alexnet"}


@pytest.mark.parametrize("name", [*ROWS, "imagenet_xnor_alexnet"])
def test_images_are_read_from_disk_at_224(name):
    config = load(name)
    assert config.name == name
    assert config.data.name == "imagenet2012" and config.data.stream and config.data.flip
    assert config.data.image_size in (None, 224)


@pytest.mark.full
@pytest.mark.parametrize("name", ROWS)
def test_networks_have_the_published_sizes(name):
    row = PUBLISHED[ROWS[name]]
    megabits, gigaflops = counted_as(row, account_of(load(name)))
    assert (round(megabits, 1), round(gigaflops, 2)) == (row.megabits, row.gigaflops)


def test_alexnet_has_the_weights_of_the_authors_network():
    account = account_of(load("imagenet_xnor_alexnet"))
    assert (
        account.binary_weights == 256 * 96 * 25 + 384 * 256 * 9 + 384 * 384 * 9 + 256 * 384 * 9 + 9216 * 4096 + 4096**2
    )
    assert account.full_precision_weights == 96 * 3 * 121 + 4096 * 1000


@pytest.mark.parametrize(
    ("recipe", "name"), [("reactnet", "imagenet_reactnet_resnet18"), ("bireal", "imagenet_bireal_resnet18")]
)
def test_the_stages_that_a_header_names_can_start(recipe, name):
    stages = RECIPES[recipe](load(name))
    check_stages(stages)
    assert all(stage.config.data.stream for stage in stages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig("digits", stream=True), r"`data.stream` \(=True\) does not go with digits, which is loaded whole"),
        (DataConfig("my.npz", stream=True), r"`data.stream` \(=True\) does not go with my.npz"),
        (
            DataConfig("mnist", stream=True, preprocessing="random_resize_crop"),
            r"`data.preprocessing` \(='random_resize_crop'\) is not known; did you mean 'random_resized_crop'\?",
        ),
        (
            DataConfig("mnist", preprocessing="resize_crop"),
            r"`data.preprocessing` \(='resize_crop'\) crops at random as images are read; set `data.stream`",
        ),
        (
            DataConfig("mnist", stream=True, preprocessing="random_resized_crop", smallest_area=0.2),
            r"`data.smallest_area` \(=0.2\) does not go with random_resized_crop",
        ),
        (
            DataConfig("mnist", stream=True, image_size=64),
            r"`data.image_size` \(=64\) needs a `data.preprocessing`: res",
        ),
        (
            DataConfig("mnist", stream=True, preprocessing="resize_crop", image_size=0),
            r"`data.image_size` \(=0\) must be at least 1",
        ),
        (DataConfig("cifar10", lighting_std=-0.1), r"`data.lighting_std` \(=-0.1\) must not be negative; 0 switches"),
    ],
)
def test_data_that_cannot_be_read_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        validate(Config("test", epochs=1, batch_size=1, data=data))


def test_a_config_of_before_reads_as_one_that_does_not_stream():
    config = replace(load("imagenet_bireal_resnet18"), data=DataConfig("cifar10"))
    values = to_dict(config)
    for key in ("stream", "preprocessing", "image_size", "lighting_std"):
        del values["data"][key]
    assert from_dict(values).data == config.data
