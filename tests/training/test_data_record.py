"""What a run keeps of its data, and how it notices others."""

import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_sets import brightness_set, write_npz

from bnn_jax.errors import UsageError
from bnn_jax.training.config import Config, DataConfig
from bnn_jax.training.data_record import ChangedDataWarning, data_of_run, record_data, warn_if_changed
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.run_folder import write_checksummed

NAMES = ("ant", "bee", "cow")
FIRST, OTHER = brightness_set(30), brightness_set(30)
OTHER.train.images[0] += 1


def test_a_run_records_its_classes_and_goes_on_with_the_same_alone(tmp_path):
    dataset = replace(FIRST, class_names=NAMES)
    record_data(tmp_path, DataConfig("mine"), dataset)
    recorded = json.loads((tmp_path / "data.json").read_text())
    assert recorded["class_names"] == list(NAMES) and (recorded["shape"], recorded["train"]) == ([8, 8, 1], 30)
    (tmp_path / "result.json").touch()
    record_data(tmp_path, DataConfig("mine"), dataset)
    with pytest.raises(
        UsageError, match=r"have the `class_names` \['ant', 'cow', 'bee'\] now, but had \['ant', 'bee', 'co"
    ):
        record_data(tmp_path, DataConfig("mine"), replace(dataset, class_names=("ant", "cow", "bee")))


def test_a_run_whose_epochs_would_have_other_steps_is_refused(tmp_path):
    record_data(tmp_path, DataConfig("mine"), FIRST)
    (tmp_path / "result.json").touch()
    with pytest.raises(
        UsageError, match="have the training examples 24 now, but had 30 when the run was begun; give th"
    ):
        record_data(tmp_path, DataConfig("mine"), brightness_set(24))


def test_streamed_images_that_changed_are_noticed(tmp_path):
    labels = np.arange(60) % 3
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)):
        path = tmp_path / "pets" / NAMES[labels[index]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    data, workdir = DataConfig(str(tmp_path / "pets"), stream=True), tmp_path / "run"
    workdir.mkdir()
    record_data(workdir, data, load_data(data))
    (workdir / "result.json").touch()
    data_of_run(workdir, Config("mine", 1, 8, data=data), None)
    (tmp_path / "pets" / "ant" / "0.png").rename(tmp_path / "pets" / "ant" / "99.png")
    with pytest.warns(ChangedDataWarning, match="are not those with which the run"):
        record_data(workdir, data, load_data(data))
    with pytest.warns(ChangedDataWarning, match="are not those with which the run"):
        data_of_run(workdir, Config("mine", 1, 8, data=data), None)


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun on an .npz file, and what its config says of it."""
    data = DataConfig(write_npz(FIRST, tmp_path / "mine.npz"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    record_data(workdir, data, load_data(data))
    (workdir / "result.json").touch()
    return workdir, data


def test_a_file_that_was_written_with_other_arrays_is_noticed(begun):
    workdir, data = begun
    write_npz(OTHER, data.name)
    for _ in range(2):
        with pytest.warns(
            ChangedDataWarning, match=r"mine.npz'\) are not those with which the run in .*run was begun; give"
        ):
            warn_if_changed(workdir, data)
        with pytest.warns(ChangedDataWarning, match="are not those with which the run"):
            record_data(workdir, data, load_data(data))
    with pytest.warns(ChangedDataWarning, match="are not those with which the run"):
        data_of_run(workdir, Config("mine", 1, 8, data=data), None)


def test_a_record_without_digests_of_an_earlier_version_forbids_nothing(begun):
    workdir, data = begun
    recorded = json.loads((workdir / "data.json").read_text())
    write_checksummed(workdir / "data.json", {name: recorded[name] for name in ("name", "shape", "class_names")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_changed(workdir, data)
        data_of_run(workdir, Config("mine", 1, 8, data=data), None)
        record_data(workdir, data, load_data(data))
    assert json.loads((workdir / "data.json").read_text()) == recorded


@pytest.mark.parametrize("change", [lambda path: os.utime(path, (0, 0)), os.unlink, lambda path: None])
def test_the_same_arrays_are_no_change(begun, change):
    workdir, data = begun
    change(data.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_changed(workdir, data)


def test_each_part_of_a_set_is_in_its_digest():
    labels = replace(FIRST.test, labels=1 - FIRST.test.labels)
    changed = [OTHER, replace(FIRST, test=labels), replace(FIRST, num_classes=4), replace(FIRST, std=(61.0,))]
    digests = {dataset.digest for dataset in (FIRST, *changed)}
    assert len(digests) == 5 and brightness_set(30).digest == FIRST.digest
    assert np.all([len(digest) == 16 for digest in digests])
