"""Recipes: how papers train in several stages, as lists of :class:`Stage` made from one config.

The config gives the data, the batch size, the seed, and of its network the width, the stage sizes and the stem; if its
network is of the recipe's own family it is taken as it is.  Its `epochs` are those of the longest stage, the others
keep the paper's proportions.  Optimizers, learning rates and decays are the papers' own, found for the papers' batch
sizes and data.  Step-wise schedules become `staircase` or `cosine`, and augmentation is that of the config.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bnn_jax.models import MODELS
from bnn_jax.stages.stage import Stage
from bnn_jax.training.config import Config, DistillationConfig, ModelConfig, OptimConfig

REAL = OptimConfig("sgd", 0.1, weight_decay=1e-4, schedule="cosine", latent_box=None)
"""He et al.'s settings for full precision."""

BI_REAL = ("bireal", "ebireal", "ftbnn")
"""Beginnings of the names of Bi-Real Net's family, whose networks have the option `activation`."""


def bireal(base: Config) -> list[Stage]:
    """Bi-Real Net: the activation turns into sign step by step.

    relu        full precision with ReLU: SGD 0.1
    leaky_clip  clip(x, -1, 1) with slope 0.1 outside: SGD 0.01
    clip        clip(x, -1, 1): SGD 0.01
    binary      sign and magnitude-aware weights: SGD 0.01 in steps, no weight decay; 20 epochs
    norm        weights -1/+1 without a scale, batch normalization alone is trained: 1 epoch

    The settings of the two middle stages are a reading: the paper calls them finetuning.

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """

    def real(activation):
        return _network(base, "bireal_resnet20", family=BI_REAL, activation=activation)

    binary = _network(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    fine = OptimConfig("sgd", 0.01, schedule="staircase", latent_box=None)
    return [
        _stage(base, "relu", real("relu"), REAL),
        _stage(base, "leaky_clip", real("leaky_clip"), fine, initialise_from="relu"),
        _stage(base, "clip", real("clip"), fine, initialise_from="leaky_clip"),
        _stage(base, "binary", binary, fine, initialise_from="clip"),
        _stage(
            base,
            "norm",
            replace(binary, kernel_quantizer="binary"),
            replace(fine, train_only=("*norm*",)),
            epochs=1 / 20,
            initialise_from="binary",
        ),
    ]


def reactnet(base: Config) -> list[Stage]:
    """ReActNet: binary activations first, then binary weights, taught by the distribution loss alone.

    teacher  full precision: SGD 0.1; the paper's is a trained ResNet-34
    inputs   RSign, real weights: Adam 2.5e-3, linear decay, weight decay 1e-5; 128 epochs
    binary   both binary, no weight decay; 128 epochs

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    taught = DistillationConfig({"distribution": 1.0}, label_weight=0.0)
    kernels = "bn_free" if base.model.name.endswith("bn_free") else "magnitude_aware"
    binary = _network(base, "reactnet_resnet20", family="reactnet", inputs="rsign", kernels=kernels)
    if binary.name == "reactnet_resnet20":
        teacher = _network(base, "resnet20", family="resnet")
    else:
        teacher = _network(base, "resnet34", family="resnet34", stem=_stem(binary))
    adam = OptimConfig("adam", 2.5e-3, schedule="linear", latent_box=None)
    inputs = replace(binary, kernel_quantizer="full_precision")
    return [
        _stage(base, "teacher", teacher, REAL),
        _stage(base, "inputs", inputs, replace(adam, weight_decay=1e-5), taught=taught, teacher="teacher"),
        _stage(base, "binary", binary, adam, taught=taught, teacher="teacher", initialise_from="inputs"),
    ]


def real_to_binary(base: Config) -> list[Stage]:
    """Real-to-Binary: each stage is taught by the one before, with attention matching until the weights are binary.

    real     ResNet-18 in full precision: SGD 0.1; 100 epochs
    tanh     the gated network with tanh in sign's place: Adam 1e-3; labels 1, attention 30, knowledge 3; 75 epochs
    inputs   binary activations: the same
    binary   both binary, from the variables of `inputs`: Adam 2e-4; labels 1, knowledge 0.8; 75 epochs

    Attention is matched after every stage of ResNet-18, and after every block where the teacher is a gated network.

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535; settings of larq zoo.
    """
    default = "real_to_binary_resnet18"
    binary = _network(base, default, family="real_to_binary", inputs="ste_sign", kernels="binary")
    real = _network(base, "resnet18", family="resnet18", stem=_stem(binary))
    inputs = replace(binary, kernel_quantizer="full_precision")
    tanh = replace(inputs, input_quantizer="full_precision")
    matching = DistillationConfig({"attention": 30.0, "knowledge": 3.0})
    last = DistillationConfig({"knowledge": 0.8})
    adam = OptimConfig("adam", 1e-3, weight_decay=1e-5, schedule="staircase", latent_box=None)
    slower = replace(adam, learning_rate=2e-4, weight_decay=0.0)
    return [
        _stage(base, "real", real, REAL),
        _stage(base, "tanh", tanh, adam, epochs=0.75, taught=matching, teacher="real"),
        _stage(base, "inputs", inputs, adam, epochs=0.75, taught=matching, teacher="tanh"),
        _stage(base, "binary", binary, slower, epochs=0.75, taught=last, teacher="inputs", initialise_from="inputs"),
    ]


def dir_net(base: Config) -> list[Stage]:
    """DIR-Net: a binary network learns the normalised activations of a real one.

    real    the network in full precision: SGD 0.1
    binary  dir_net weights, ede_sign activations: SGD 0.1; labels 1, standardized 1

    The paper's weight of the distillation could not be confirmed; 1 is a reading.

    Reference: Qin et al., Distribution-sensitive Information Retention for Accurate Binary Neural Network, 2022,
    arXiv:2109.12338.
    """
    binary = _network(base, "irnet_resnet20", family="irnet", inputs="ede_sign", kernels="dir_net")
    return _taught(base, _real(binary), binary, DistillationConfig({"standardized": 1.0}))


def dgrl(base: Config) -> list[Stage]:
    """DGRL: every stage of a binary network with a real bottleneck learns from the same stage of a real network.

    real    Bi-Real Net's structure in full precision, with ReLU: SGD 0.1
    binary  approx_sign activations, magnitude_aware weights: SGD 0.1; labels 1, features 1

    The paper's teacher, settings and weight of the distillation could not be confirmed; this is a reading.

    Reference: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """
    binary = _network(base, "dgrl_resnet18", family="dgrl", inputs="approx_sign", kernels="magnitude_aware")
    real = _network(base, "bireal18", family="bireal18", stem=_stem(binary))
    return _taught(base, real, binary, DistillationConfig({"features": 1.0}))


def ttq(base: Config) -> list[Stage]:
    """Trained ternary quantization: ternary weights from a full-precision network, each layer's scaled to [-1, 1].

    real     the config's network in full precision: SGD 0.1
    ternary  ttq weights, real activations: SGD 0.1 in steps, weight decay 2e-4

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    sgd = OptimConfig("sgd", 0.1, weight_decay=2e-4, schedule="staircase", latent_box=None)
    ternary = replace(_real(base.model), kernel_quantizer="ttq")
    return [
        _stage(base, "real", _real(base.model), sgd),
        _stage(base, "ternary", ternary, sgd, initialise_from="real", transfer="normalized"),
    ]


def inq(base: Config) -> list[Stage]:
    """Incremental network quantization: weights become powers of two, the largest first, the others make up for it.

    real    the config's network in full precision: SGD 0.1
    powers  5 bits, half of the weights frozen at the start and all in the last quarter: SGD 0.003 in steps, weight
            decay 5e-4 of what is not quantized

    Reference: Zhou et al., Incremental Network Quantization, 2017, arXiv:1702.03044.
    """
    sgd = OptimConfig("sgd", 0.003, weight_decay=5e-4, schedule="staircase", latent_box=None)
    powers = replace(_real(base.model), kernel_quantizer="inq")
    return [
        _stage(base, "real", _real(base.model), REAL),
        _stage(base, "powers", powers, sgd, initialise_from="real"),
    ]


def bnn_plus(base: Config, *, regularizer: str = "manhattan") -> list[Stage]:
    """BNN+: a network with hard tanh gives the start of weights and scales, a regularizer draws them together.

    real    hard tanh in sign's place: SGD 0.1 in steps; 120 epochs
    binary  SignSwish 5 and learned scales, from the median |w| with R1, the mean with R2: Adam 1e-3 in steps, lambda
            1e-6; 50 epochs

    Args:
      regularizer: "manhattan" (R1) or "euclidean" (R2).

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    binary = _network(base, "bireal_resnet20", family=BI_REAL, inputs="swish_sign", kernels="bnn_plus")
    binary = replace(
        binary,
        input_quantizer_options={"beta": 5.0},
        kernel_quantizer_options={"beta": 5.0, "initial": "median" if regularizer == "manhattan" else "mean"},
    )
    real = _network(base, "bireal_resnet20", family=BI_REAL, activation="clip")
    adam = OptimConfig("adam", 1e-3, schedule="staircase", latent_box=None)
    drawn = {"regularizer": regularizer, "regularizer_strength": 1e-6}
    return [
        _stage(base, "real", real, replace(REAL, schedule="staircase")),
        _stage(base, "binary", binary, adam, epochs=50 / 120, initialise_from="real", changes=drawn),
    ]


def s2_bnn(base: Config) -> list[Stage]:
    """S2-BNN: a binary network learns without labels which images a teacher finds alike; a linear probe tells how well.

    teacher  full precision; the paper's is MoCo V2, this one is trained with labels: put another run in its place
    inputs   binary activations, similarity loss alone, T = 0.2: Adam 3e-4, cosine; 200 epochs
    binary   both binary, from the variables of `inputs`; 200 epochs
    probe    the last layer anew, alone trained, with labels: SGD 0.1

    The embeddings are the outputs of the last layer, one for each class, where the paper has a projection of 128.  The
    queue holds 4096 keys, the paper's 65536, and the frozen part of the probe uses the statistics of the batch.

    Reference: Shen et al., S2-BNN: Bridging the Gap Between Self-Supervised Real and 1-bit Neural Networks via Guided
    Distribution Calibration, 2021, arXiv:2102.08946.
    """
    taught = DistillationConfig({"similarity": 1.0}, label_weight=0.0, temperature=0.2)
    binary = _network(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    inputs = replace(binary, kernel_quantizer="full_precision")
    adam = OptimConfig("adam", 3e-4, schedule="cosine", latent_box=None)
    probe = OptimConfig("sgd", 0.1, schedule="cosine", latent_box=None, train_only=("head/*",))
    last = {"teacher": "teacher", "which": "last"}
    return [
        _stage(base, "teacher", _real(binary), REAL),
        _stage(base, "inputs", inputs, adam, taught=taught, **last),
        _stage(base, "binary", binary, adam, taught=taught, initialise_from="inputs", **last),
        _stage(base, "probe", binary, probe, initialise_from="binary", transfer="without_head", which="last"),
    ]


def binaryduo(base: Config) -> list[Stage]:
    """BinaryDuo: ternary neurons are trained, and each becomes two binary ones that are fine-tuned.

    coupled    codes 0, 1/2, 1 and weights of 1 bit, or real ones in the VGG-7: SGD 0.1; 120 epochs
    decoupled  codes 0, 1: SGD 0.01, from the same function; 40 epochs

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517; rates are a reading of the authors' program.
    """
    real_weights = base.model.name == "binaryduo_vgg7"
    kernels = {} if real_weights else {"kernels": "dorefa", "kernel_options": {"bits": 1}}
    first = _network(base, "binaryduo_resnet18", family="binaryduo", inputs="coupled", coupled=True, **kernels)
    second = _network(base, "binaryduo_resnet18", family="binaryduo", inputs="decoupled", coupled=False, **kernels)
    fine = replace(REAL, learning_rate=0.01)
    return [
        _stage(base, "coupled", first, REAL),
        _stage(base, "decoupled", second, fine, epochs=1 / 3, initialise_from="coupled", transfer="decoupled"),
    ]


RECIPES: dict[str, Callable[..., list[Stage]]] = {
    "bireal": bireal,
    "reactnet": reactnet,
    "real_to_binary": real_to_binary,
    "dir_net": dir_net,
    "dgrl": dgrl,
    "ttq": ttq,
    "inq": inq,
    "bnn_plus": bnn_plus,
    "s2_bnn": s2_bnn,
    "binaryduo": binaryduo,
}
"""name -> function of a config that makes the list of stages."""


def _network(
    base: Config,
    default: str,
    *,
    family: str | tuple[str, ...],
    inputs: str = "full_precision",
    kernels: str = "full_precision",
    kernel_options: dict[str, Any] | None = None,
    **options: Any,
) -> ModelConfig:
    """The network of `base` if its name begins with `family`, else `default` in its width, stage sizes and stem."""
    model = base.model
    own = model.name.startswith(family)
    name = model.name if own else default
    known = inspect.signature(MODELS[name].constructor).parameters
    taken = {key: value for key, value in model.options.items() if own or key in {"stage_sizes", "stem"} & set(known)}
    return ModelConfig(
        name,
        model.width,
        input_quantizer=inputs,
        kernel_quantizer=kernels,
        kernel_quantizer_options=kernel_options or {},
        options=taken | options,
    )


def _stem(model: ModelConfig) -> str:
    """The stem of a network, for its teacher: stages that are matched have to be of the same size."""
    return model.options.get("stem", inspect.signature(MODELS[model.name].constructor).parameters["stem"].default)


def _real(model: ModelConfig) -> ModelConfig:
    return replace(
        model,
        input_quantizer="full_precision",
        kernel_quantizer="full_precision",
        input_quantizer_options={},
        kernel_quantizer_options={},
        input_scaling=False,
    )


def _taught(base: Config, real: ModelConfig, binary: ModelConfig, taught: DistillationConfig) -> list[Stage]:
    return [
        _stage(base, "real", real, REAL),
        _stage(base, "binary", binary, REAL, taught=taught, teacher="real"),
    ]


def _stage(
    base: Config,
    name: str,
    model: ModelConfig,
    optim: OptimConfig,
    *,
    epochs: float = 1.0,
    taught: DistillationConfig | None = None,
    changes: dict[str, Any] | None = None,
    **relations: Any,
) -> Stage:
    """A stage with `epochs` as a share of those of `base`, and what else `changes` in its config."""
    config = replace(
        base,
        name=f"{base.name}_{name}",
        epochs=max(1, round(base.epochs * epochs)),
        loss="cross_entropy",
        regularizer="none",
        model=model,
        optim=optim,
        distillation=taught or DistillationConfig(),
        optimizers=(),
    )
    return Stage(name, replace(config, **(changes or {})), **relations)
