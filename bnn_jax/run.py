"""A run as one object: train one, or load it from its folder, then look at it, evaluate, draw or pack it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from bnn_jax.analysis.run_plots import plot_run
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.names import last_part
from bnn_jax.packed import PackedModel
from bnn_jax.packed.runs import freeze_run
from bnn_jax.paths import local_path
from bnn_jax.stages.teachers import load_network
from bnn_jax.training import loop
from bnn_jax.training.callbacks import Callback
from bnn_jax.training.config import Config
from bnn_jax.training.data_record import data_of_run
from bnn_jax.training.devices import is_first_process
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.experiment import make_model
from bnn_jax.training.initial import with_start
from bnn_jax.training.input_pipeline import with_data
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.programs import Teacher
from bnn_jax.training.progress import OnProgress, progress_display, silent
from bnn_jax.training.run_folder import check_workdir, finished_result, read_config
from bnn_jax.training.validation import validate
from bnn_jax.types import BatchLabels, Images

Which = Literal["best", "last"]
"""The variables of the best validation epoch, or of the newest checkpoint."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run, finished or not; what its folder holds is read when it is first asked for.

    Attributes:
      workdir: its folder.
      config: what it is, complete.
      data: those that it was given in memory, as :func:`train` takes them; None loads what the config names.
    """

    workdir: Path
    config: Config
    data: Any | None = None

    def __repr__(self) -> str:
        result = self.result
        state = "not finished" if result is None else f"test accuracy {100 * result['test_accuracy_best']:.2f} %"
        return f"Run({self.workdir}: {last_part(self.config.model.name)}, {last_part(self.config.optim.name)}, {state})"

    @property
    def paths(self) -> dict[str, Path]:
        """What there is in the folder: "config", "data", "metrics", "checkpoints" and "result"."""
        names = {name: f"{name}.json" for name in ("config", "data", "result")}
        names |= {"metrics": "metrics.jsonl", "checkpoints": "checkpoints"}
        return {name: path for name, file in names.items() if (path := self.workdir / file).exists()}

    @property
    def result(self) -> dict[str, Any] | None:
        """The `result.json` of a finished run: test accuracies at the best and the last epoch, curves, step time."""
        return finished_result(self.config, self.workdir)

    @property
    def history(self) -> dict[str, list[Any]]:
        """Losses, accuracies and what else is recorded of each epoch so far: name -> a list of values."""
        epochs = [record for record in read_metrics(self.workdir / "metrics.jsonl") if record["kind"] == "evaluation"]
        names = dict.fromkeys(name for record in epochs for name in record if name != "kind")
        return {name: [record.get(name) for record in epochs] for name in names}

    @cached_property
    def dataset(self) -> Dataset | ImageStream:
        """The data, loaded."""
        return data_of_run(self.workdir, self.config, self.data)

    @cached_property
    def model(self) -> Any:
        """The network, a Flax module: ``run.model.apply(run.variables, images, train=False)`` of normalized images."""
        return make_model(self.config.model, num_classes=self.dataset.num_classes)

    @cached_property
    def variables(self) -> dict[str, Any]:
        """The variables of the best validation epoch, as `model.apply` takes them.

        Raises:
          UsageError: if there is no checkpoint yet.
        """
        return self.load_variables("best")

    @property
    def params(self) -> Any:
        """The parameters among :attr:`variables`: latent and real weights."""
        return self.variables["params"]

    def load_variables(self, which: Which = "best") -> dict[str, Any]:
        """The variables of the best validation epoch, or those of the newest checkpoint.

        Raises:
          UsageError: if there is no checkpoint yet.
        """
        return load_network(self.workdir, self.dataset, which=which, config=self.config).variables

    def evaluate(
        self, split: Literal["train", "validation", "test"] = "test", *, which: Which = "best"
    ) -> dict[str, Any]:
        """Loss and accuracy on a split, see :func:`bnn_jax.training.evaluation.evaluate_run`.

        Raises:
          UsageError: if there is no checkpoint yet.
          RunError: if the logits are not finite.
        """
        return evaluate_run(self.workdir, split=split, which=which, data=self.dataset, config=self.config)

    def freeze(self, *, which: Which = "best") -> PackedModel:
        """The network on packed bits: ``run.freeze().predict(images)`` with uint8 images, or for `packed.save`.

        Raises:
          UsageError: if there is no checkpoint yet, or the network cannot be packed.
        """
        return self._on_images(freeze_run(self.workdir, which=which, data=self.dataset, config=self.config).packed)

    def predict(self, images: Images) -> BatchLabels:
        """The class that the network as it was trained, at its best epoch, gives to each of some uint8 images.

        Raises:
          ValueError: for images of another dtype or shape.
          RunError: if a logit is not finite.
        """
        return self._on_images(self.variables).predict(images)

    def _on_images(self, variables: Any) -> PackedModel:
        described = {"image_shape": self.dataset.image_shape, "num_classes": self.dataset.num_classes}
        described |= {"mean": self.dataset.mean, "std": self.dataset.std, "model": vars(self.config.model)}
        return PackedModel(self.model, variables, described)

    def plot(self, output: str | Path | None = None) -> list[Path]:
        """Draw its curves and diagnostics to PNG files in a folder, its own where None is given; returns their paths.

        Raises:
          UsageError: if it has not made a step yet.
          RunError: if a picture cannot be written.
        """
        return plot_run(self.workdir, output=output)


def train(
    config: Config,
    workdir: str | Path,
    *,
    data: Any | None = None,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    extend: bool = False,
    on_progress: OnProgress | None = None,
    warm_start: Any | None = None,
    teacher: Teacher | None = None,
    devices: Mesh | None = None,
    workers: int = 0,
    strict: bool = False,
) -> Run:
    """Train a network, or go on with its training where it was left, or load it if that is finished.

    Args:
      on_progress: told of every step; None shows a bar and a line an epoch,
        :func:`bnn_jax.training.progress.silent` nothing.
      config, workdir, data, callbacks, overwrite, extend, warm_start, teacher, devices, workers, strict: as
        :func:`bnn_jax.training.loop.train` takes them, which also tells what is raised.
    """
    workdir, (config, dataset) = local_path("workdir", workdir), with_data(config, data)
    config = with_start(validate(config), workdir)  # Here, for `overwrite` may move what it starts from.
    options = {"callbacks": callbacks, "overwrite": overwrite, "extend": extend, "warm_start": warm_start}
    options |= {"teacher": teacher, "devices": devices, "workers": workers, "strict": strict}
    shown = nullcontext(silent if on_progress is None else on_progress)
    if on_progress is None and is_first_process():
        shown = progress_display(f"{config.name} {last_part(config.optim.name)}")
    with shown as told:
        loop.train(config, workdir, data=dataset, on_progress=told, **options)
    return Run(workdir, config, dataset)


def load_run(
    folder: str | Path, *, data: Any | None = None, data_dir: str | None = None, config: Config | None = None
) -> Run:
    """The run in a folder, finished or not.

    Args:
      folder: of the run.
      data: the arrays that the run was given, as :func:`train` took them; None loads what its config names.
      data_dir: where the data set lies now; None is where the run found it.
      config: of the run, where it has what no name finds again, as a network that was defined in a notebook; None reads
        it.

    Raises:
      UsageError: if `folder` holds no run, or that of another config.
    """
    folder = local_path("folder", folder)
    recorded = read_config(folder)
    if config is not None:
        config = replace(validate(with_data(config, data)[0]), init_sha256=recorded.init_sha256)
        check_workdir(config, folder)
    config = recorded if config is None else config
    if data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    return Run(folder, config, data)
