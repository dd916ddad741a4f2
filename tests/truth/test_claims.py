"""A folder is a run's when the run begins: a start that fails leaves nothing that refuses the corrected command."""

from dataclasses import replace

import numpy as np
import pytest
from run_script import run_script
from small_sets import brightness_set

from bnn_jax.errors import RunError, UsageError
from bnn_jax.stages.stage import Stage, run_stages
from bnn_jax.sweeps.engine import Run, recorded_result
from bnn_jax.training import loop
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.loop import train
from bnn_jax.training.run_folder import check_workdir, claim_workdir, has_begun, locked, read_config, write_checksummed

CONFIG = Config(
    "mine",
    epochs=1,
    batch_size=8,
    loss="cross_entropy",
    model=ModelConfig("mnist_mlp", 4),
    optim=OptimConfig("sgd", 0.1),
)
OTHER = replace(CONFIG, batch_size=4)


@pytest.fixture
def files(tmp_path):
    """Files that are no data: damaged, and with labels that no class has."""
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4 and then nothing")
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.full(20, 7)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "labels.npz", **arrays, num_classes=3)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "line", "code"),
    [
        ("train", "--data.name nothing", 2),
        ("train", "--data.name {files}/nothing.npz", 2),
        ("train", "--data.name cifar10 --data.data-dir /nowhere", 2),
        ("train", "--data.name {files}/damaged.npz", 1),
        ("train", "--data.name {files}/labels.npz", 1),
        ("train", "--data.validation-examples 100000", 2),
        ("train", "--batch-size 100000", 2),
        ("train", "--model.name lenet --model.options kernel_size 99", 2),
        ("train", "--optim.name adamm", 2),
        ("train", "--devices 99", 2),
        ("train_stages", "dir_net --data.name nothing", 2),
        ("train_stages", "dir_net --finished real {files}/nothing", 2),
        ("train_stages", "dir_net --batch-size 100000", 2),
        ("sweep", "--data.name nothing --execution sequential", 2),
        ("sweep", "--optim.learning-rate 0.1 -1", 2),
        ("compare_optimizers", "--data.name nothing --execution sequential", 2),
        ("compare_estimators", "--data.name nothing --execution sequential", 2),
        ("compare_architectures", "--data.name nothing --execution sequential", 2),
    ],
)
def test_a_start_that_fails_leaves_no_folder(script, line, code, files):
    run_script(script, *line.format(files=files).split(), "--workdir", files / "runs" / "mine", code=code)
    assert not (files / "runs").exists()


@pytest.mark.parametrize(
    ("script", "line", "code"),
    [
        ("prepare_data", "cifar --data-dir {out}", 2),
        ("write_synthetic_imagenet", "--train-examples 0 --data-dir {out}", 2),
        ("export", "{out}-of-no-run -o {out}/m.bnn.safetensors", 2),
        ("plot_run", "{out}-of-no-run --output {out}", 2),
        ("benchmark", "training --config {out}/nothing.py --output {out}/found.json", 2),
        ("summarize", "resnet21 --json {out}/found.json", 2),
    ],
)
def test_a_script_that_fails_leaves_no_output(script, line, code, tmp_path):
    run_script(script, *line.format(out=tmp_path / "out").split(), code=code)
    assert not (tmp_path / "out").exists()


class OutOfMemory(Exception):
    """What a device raises when the program is loaded."""


def test_a_run_that_ends_before_its_first_step_gives_its_folder_to_another_config(tmp_path, monkeypatch):
    def fail(*_):
        raise OutOfMemory

    monkeypatch.setattr(loop, "_train_steps", fail)
    data = brightness_set(16)
    for config in (CONFIG, OTHER):
        with pytest.raises(OutOfMemory):
            train(config, tmp_path / "run", data=data)
        assert read_config(tmp_path / "run").batch_size == config.batch_size
        assert not has_begun(tmp_path / "run")


@pytest.mark.parametrize("left", ["checkpoints/1.json", "checkpoints/quarantine-1", "result.json", "diverged.json"])
def test_a_run_that_has_begun_keeps_its_folder(left, tmp_path):
    claim_workdir(CONFIG, tmp_path)
    # Steps that were made and never saved, and a save that was not finished, are nobody's.
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5.json.tmp").touch()
    check_workdir(OTHER, tmp_path)
    assert recorded_result(Run("mine", OTHER, tmp_path)) is None
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{}\n")
    check_workdir(CONFIG, tmp_path)
    for refuse in (check_workdir, claim_workdir):
        with pytest.raises(UsageError, match=r"`batch_size` is 4 now, but .* holds a run with 8; choose another"):
            refuse(OTHER, tmp_path)


def test_a_run_that_compiles_its_first_step_keeps_its_folder_from_others(tmp_path):
    with locked(tmp_path / "run"):
        claim_workdir(CONFIG, tmp_path / "run")
        with pytest.raises(UsageError, match=r"is being trained in by process"):
            train(OTHER, tmp_path / "run", data=brightness_set(16))
    assert read_config(tmp_path / "run").batch_size == 8


def test_a_stage_without_its_predecessor_leaves_no_folder(tmp_path):
    gone = Stage("second", CONFIG, initialise_from=str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"`initialise_from` .* must be an earlier stage \(none\) or the folder of a"):
        run_stages([gone], tmp_path / "stages", data=brightness_set(16))
    # A run that is finished by its result, and whose checkpoints are lost.
    (tmp_path / "gone").mkdir()
    claim_workdir(CONFIG, tmp_path / "gone")
    write_checksummed(tmp_path / "gone" / "result.json", {})
    with pytest.raises(UsageError, match=r"gone\) holds no checkpoint yet; train it first"):
        run_stages([gone], tmp_path / "stages", data=brightness_set(16))
    with pytest.raises(UsageError, match=r"`data.name` \(='nothing'\) is not 'digits'"):
        run_stages([Stage("first", replace(CONFIG, data=DataConfig("nothing")))], tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_a_stage_that_was_claimed_alone_starts_from_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_run_epochs", lambda *_: pytest.fail("the run is stopped before"))
    monkeypatch.setattr(loop, "resume", lambda *_: pytest.fail("the folder is claimed"))
    stage = Stage("first", CONFIG)
    for transfer in ("by_name", "without_head"):
        with pytest.raises(pytest.fail.Exception, match="the folder is claimed"):
            run_stages([replace(stage, transfer=transfer)], tmp_path, data=brightness_set(16))
        assert f'"{transfer}"' in (tmp_path / "first" / "stage.json").read_text()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make the folder .*file/run \(Not a directory\); choose another"):
        train(CONFIG, tmp_path / "file" / "run", data=brightness_set(16))
