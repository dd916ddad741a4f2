"""Recipes: how papers train in several stages, as lists of :class:`Stage` made from one config.

The config gives the data, the batch size, the seed, and of its network the width, the stage sizes and the stem; if its
network is of the recipe's own family it is taken as it is.  Its `epochs` are those of the longest stage, the others
keep the paper's proportions.  Optimizers, learning rates, schedules and decays are the papers' own or their programs',
found for their batch sizes and data; what neither says is called a reading.  Schedules are shares of a stage, so they
keep their form at any length; rates that those programs change every epoch change every step here.  Augmentation is
that of the config.  `docs/recipes.md` has every number beside its source.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bnn_jax.models.build import entry_of
from bnn_jax.stages.stage import Stage
from bnn_jax.training.config import Config, DistillationConfig, ModelConfig, OptimConfig


def _at_epochs(epochs: int, *milestones: int, factor: float = 0.1) -> dict[str, Any]:
    """A stage's schedule: the rate times `factor` at the start of these of its `epochs`, counted from 0."""
    shares = tuple(milestone / epochs for milestone in milestones)
    return {"schedule": "milestones", "schedule_options": {"at_shares": shares, "factor": factor}}


REAL = OptimConfig("sgd", 0.1, weight_decay=1e-4, latent_box=None, **_at_epochs(64, 32, 48))
"""He et al.'s settings for full precision (2016, section 4.2): 64,000 steps, all parameters decayed."""

ADAM = OptimConfig("adam", options={"decoupled": False}, latent_box=None)
"""That of PyTorch and Keras, whose weight decay is in the gradient."""

BI_REAL = ("bireal", "ebireal", "ftbnn")
"""Beginnings of the names of Bi-Real Net's family, whose networks have the option `activation`."""


def bireal(base: Config) -> list[Stage]:
    """Bi-Real Net: the activation turns into sign step by step.

    relu        full precision with ReLU: SGD 0.1
    leaky_clip  clip(x, -1, 1) with slope 0.1 outside: as binary
    clip        clip(x, -1, 1): as binary
    binary      sign and magnitude-aware weights: SGD 0.01, with 34 layers 0.08 for a batch of 1024, x0.1 at 10 and 15
                of 20 epochs, no weight decay
    norm        weights -1/+1 without a scale, batch normalization alone is trained: SGD 0.01; 1 epoch

    The settings of the two middle stages are a reading, for the paper calls them finetuning, and so is the last rate.

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """

    def real(activation):
        return _network(base, "bireal_resnet20", family=BI_REAL, activation=activation)

    binary = _network(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    rate = 0.08 if "34" in binary.name else 0.01
    fine = OptimConfig("sgd", rate, latent_box=None, **_at_epochs(20, 10, 15))
    return [
        _stage(base, "relu", real("relu"), REAL),
        _stage(base, "leaky_clip", real("leaky_clip"), fine, initialise_from="relu"),
        _stage(base, "clip", real("clip"), fine, initialise_from="leaky_clip"),
        _stage(base, "binary", binary, fine, initialise_from="clip"),
        _stage(
            base,
            "norm",
            replace(binary, kernel_quantizer="binary"),
            OptimConfig("sgd", 0.01, latent_box=None, train_only=("*norm*",)),
            epochs=1 / 20,
            initialise_from="binary",
        ),
    ]


def reactnet(base: Config) -> list[Stage]:
    """ReActNet: binary activations first, then binary weights, taught by the distribution loss alone.

    teacher  full precision: SGD 0.1; the paper's is a trained ResNet-34
    inputs   RSign, real weights: Adam 2.5e-3, linear to 0, weight decay 1e-5, coupled, of convolutions and shifts; 128
             epochs
    binary   both binary: the same without weight decay; 128 epochs

    ReActNet-A has the rate 1.25e-3, networks without normalization 5e-4 with adaptive clipping 0.02 (Chen
    et al., 2021, arXiv:2104.08215).

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    taught = DistillationConfig({"distribution": 1.0}, label_weight=0.0)
    kernels = "bn_free" if base.model.name.endswith("bn_free") else "magnitude_aware"
    binary = _network(base, "reactnet_resnet20", family="reactnet", inputs="rsign", kernels=kernels)
    if binary.name == "reactnet_resnet20":
        teacher = _network(base, "resnet20", family="resnet")
    else:
        teacher = _network(base, "resnet34", family="resnet34", stem=_stem(binary))
    rate, clipping = (5e-4, 0.02) if kernels == "bn_free" else (2.5e-3, None)
    rate = 1.25e-3 if binary.name == "reactnet_a" else rate
    adam = replace(ADAM, learning_rate=rate, schedule="linear", adaptive_clipping=clipping)
    decayed = replace(adam, weight_decay=1e-5, decay_only=("st*kernel", "*shift"))
    inputs = replace(binary, kernel_quantizer="full_precision")
    return [
        _stage(base, "teacher", teacher, REAL),
        _stage(base, "inputs", inputs, decayed, taught=taught, teacher="teacher"),
        _stage(base, "binary", binary, adam, taught=taught, teacher="teacher", initialise_from="inputs"),
    ]


def real_to_binary(base: Config) -> list[Stage]:
    """Real-to-Binary: each stage is taught by the one before, with attention matching until the weights are binary.

    real     ResNet-18 in full precision: SGD 0.1; 100 epochs
    tanh     the gated network with tanh in sign's place: Adam 1e-3, 5 epochs of warm-up, x0.3 at 40, 60 and 70 of 75,
             weight decay 2e-5, coupled, of all kernels but the last; labels 1, attention_mse 30, knowledge 3
    inputs   binary activations: the same
    binary   both binary in [-1, 1], from the variables of `inputs`: the same from 2e-4 without weight decay; labels 1,
             knowledge 0.8

    Attention is matched after each of the eight blocks, in larq zoo's form, to which the weight 30 belongs.

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535; settings of larq zoo.
    """
    default = "real_to_binary_resnet18"
    binary = _network(base, default, family="real_to_binary", inputs="ste_sign", kernels="binary")
    real = _network(base, "resnet18", family="resnet18", stem=_stem(binary))
    inputs = replace(binary, kernel_quantizer="full_precision")
    tanh = replace(inputs, input_quantizer="full_precision")
    matching = DistillationConfig({"attention_mse": 30.0, "knowledge": 3.0})
    last = DistillationConfig({"knowledge": 0.8})
    slower = replace(
        ADAM,
        learning_rate=2e-4,
        warmup_share=5 / 75,
        latent_box=(-1.0, 1.0),
        **_at_epochs(75, 40, 60, 70, factor=0.3),
    )
    adam = replace(slower, learning_rate=1e-3, weight_decay=2e-5, decay_only=("st*kernel",), latent_box=None)
    return [
        _stage(base, "real", real, REAL),
        _stage(base, "tanh", tanh, adam, epochs=0.75, taught=matching, teacher="real"),
        _stage(base, "inputs", inputs, adam, epochs=0.75, taught=matching, teacher="tanh"),
        _stage(base, "binary", binary, slower, epochs=0.75, taught=last, teacher="inputs", initialise_from="inputs"),
    ]


def dir_net(base: Config) -> list[Stage]:
    """DIR-Net: a binary network learns the normalised activations of a real one.

    real    the network in full precision: SGD 0.1, cosine
    binary  dir_net weights, ede_sign activations: SGD 0.1, cosine, weight decay 1e-4 of all weights, the latent ones
            too; labels 1, standardized 1

    The paper's settings could not be confirmed: these are those of IR-Net by the same authors, and 1 is a reading.

    Reference: Qin et al., Distribution-sensitive Information Retention for Accurate Binary Neural Network, 2022,
    arXiv:2109.12338.
    """
    binary = _network(base, "irnet_resnet20", family="irnet", inputs="ede_sign", kernels="dir_net")
    sgd = OptimConfig("sgd", 0.1, weight_decay=1e-4, latent_weight_decay=1e-4, schedule="cosine", latent_box=None)
    return _taught(base, _real(binary), binary, sgd, DistillationConfig({"standardized": 1.0}))


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
    return _taught(base, real, binary, REAL, DistillationConfig({"features": 1.0}))


def ttq(base: Config) -> list[Stage]:
    """Trained ternary quantization: ternary weights from a full-precision network, each layer's scaled to [-1, 1].

    real     the config's network in full precision: as ternary
    ternary  ttq weights, real activations: SGD 0.1, x0.1 at 82, 123 and 150 of 400 epochs, weight decay 2e-4 of all
             kernels, latent ones too, and of the two levels of each layer

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    decays = {"weight_decay": 2e-4, "latent_weight_decay": 2e-4, "decay_only": ("*kernel",)}
    sgd = OptimConfig("sgd", 0.1, latent_box=None, **decays, **_at_epochs(400, 82, 123, 150))
    levels = replace(sgd, decay_only=("*kernel", "*positive_scale", "*negative_scale"))
    ternary = replace(_real(base.model), kernel_quantizer="ttq")
    return [
        _stage(base, "real", _real(base.model), sgd),
        _stage(base, "ternary", ternary, levels, initialise_from="real", transfer="normalized"),
    ]


def inq(base: Config) -> list[Stage]:
    """Incremental network quantization: weights become powers of two, the largest first, the others make up for it.

    real    the config's network in full precision: SGD 0.1
    powers  5 bits, half of the weights frozen at the start and all in the last quarter: in each quarter anew SGD 0.003,
            x0.2 at 15, 30, 45 and 60 of 63; weight decay 5e-4 of kernels, latent ones too

    Reference: Zhou et al., Incremental Network Quantization, 2017, arXiv:1702.03044.
    """
    decays = {"weight_decay": 5e-4, "latent_weight_decay": 5e-4, "decay_only": ("*kernel",)}
    sgd = OptimConfig("sgd", 0.003, latent_box=None, **decays, schedule="milestones")
    quarter = {0: 0.2**-4, 15: 0.2, 30: 0.2, 45: 0.2, 60: 0.2}
    each = [((number + at / 63) / 4, factor) for number in range(4) for at, factor in quarter.items()][1:]
    shares, factors = zip(*each)
    sgd = replace(sgd, schedule_options={"at_shares": shares, "factor": factors})
    powers = replace(_real(base.model), kernel_quantizer="inq")
    return [
        _stage(base, "real", _real(base.model), REAL),
        _stage(base, "powers", powers, sgd, initialise_from="real"),
    ]


def bnn_plus(base: Config, *, regularizer: str = "manhattan") -> list[Stage]:
    """BNN+: a network with hard tanh gives the start of weights and scales, a regularizer draws them together.

    real    hard tanh in sign's place: SGD 0.1, x0.1 every 30 of 120 epochs
    binary  SignSwish 5 and learned scales, from the median |w| with R1, the mean with R2: Adam 1e-3, x0.1 every 10 of
            50 epochs, lambda 1e-6

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
    adam = replace(ADAM, learning_rate=1e-3, **_at_epochs(50, 10, 20, 30, 40))
    drawn = {"regularizer": regularizer, "regularizer_strength": 1e-6}
    return [
        _stage(base, "real", real, replace(REAL, **_at_epochs(120, 30, 60, 90))),
        _stage(base, "binary", binary, adam, epochs=50 / 120, initialise_from="real", changes=drawn),
    ]


def s2_bnn(base: Config) -> list[Stage]:
    """S2-BNN: a binary network learns a teacher's embedding without labels; a linear probe tells how well.

    teacher  full precision; the paper's is MoCo V2, this one is trained with labels: put another run in its place
    inputs   binary activations, the loss of the embedding alone, T = 0.2: Adam 3e-4, linear to 0; 200 epochs
    binary   both binary, from the variables of `inputs`: the same
    probe    the last layer anew, alone trained, with labels: SGD 0.1, x0.1 at 60 and 80 of 100 epochs

    The loss is that of the authors' program.  The embeddings are the outputs of the last layer, one for each class,
    where the program has a projection of 128, and the frozen part of the probe uses the statistics of the batch.

    Reference: Shen et al., S2-BNN: Bridging the Gap Between Self-Supervised Real and 1-bit Neural Networks via Guided
    Distribution Calibration, 2021, arXiv:2102.08946.
    """
    taught = DistillationConfig({"embedding": 1.0}, label_weight=0.0, temperature=0.2)
    binary = _network(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    inputs = replace(binary, kernel_quantizer="full_precision")
    adam = replace(ADAM, learning_rate=3e-4, schedule="linear")
    probe = OptimConfig("sgd", 0.1, latent_box=None, train_only=("head/*",), **_at_epochs(100, 60, 80))
    last = {"teacher": "teacher", "which": "last"}
    return [
        _stage(base, "teacher", _real(binary), REAL),
        _stage(base, "inputs", inputs, adam, taught=taught, **last),
        _stage(base, "binary", binary, adam, taught=taught, initialise_from="inputs", **last),
        _stage(
            base, "probe", binary, probe, epochs=0.5, initialise_from="binary", transfer="without_head", which="last"
        ),
    ]


def binaryduo(base: Config) -> list[Stage]:
    """BinaryDuo: ternary neurons are trained, and each becomes two binary ones that are fine-tuned.

    coupled    codes 0, 1/2, 1 and weights of 1 bit, or real ones in the VGG-7: SGD 0.1 with Nesterov's momentum, x0.1
               after 70, 90 and 110 of 120 epochs, weight decay 1e-4 of all weights, the latent ones too
    decoupled  codes 0, 1, from the same function: the same from 0.01, x0.1 after 20, 30 and 35 of 40 epochs

    The numbers of epochs and the second rate are a reading of the authors' program.

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    real_weights = base.model.name == "binaryduo_vgg7"
    kernels = {} if real_weights else {"kernels": "dorefa", "kernel_options": {"bits": 1}}
    first = _network(base, "binaryduo_resnet18", family="binaryduo", inputs="coupled", coupled=True, **kernels)
    second = _network(base, "binaryduo_resnet18", family="binaryduo", inputs="decoupled", coupled=False, **kernels)
    decays = {"weight_decay": 1e-4, "latent_weight_decay": 1e-4}
    sgd = OptimConfig("sgd", 0.1, options={"nesterov": True}, latent_box=None, **decays, **_at_epochs(120, 70, 90, 110))
    fine = replace(sgd, learning_rate=0.01, **_at_epochs(40, 20, 30, 35))
    return [
        _stage(base, "coupled", first, sgd),
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
    known = inspect.signature(entry_of(name).constructor).parameters
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
    return model.options.get("stem", inspect.signature(entry_of(model.name).constructor).parameters["stem"].default)


def _real(model: ModelConfig) -> ModelConfig:
    return replace(
        model,
        input_quantizer="full_precision",
        kernel_quantizer="full_precision",
        input_quantizer_options={},
        kernel_quantizer_options={},
        input_scaling=False,
    )


def _taught(
    base: Config, real: ModelConfig, binary: ModelConfig, optim: OptimConfig, taught: DistillationConfig
) -> list[Stage]:
    return [
        _stage(base, "real", real, optim),
        _stage(base, "binary", binary, optim, taught=taught, teacher="real"),
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
        loss_options={},
        regularizer="none",
        model=model,
        optim=optim,
        distillation=taught or DistillationConfig(),
        optimizers=(),
    )
    return Stage(name, replace(config, **(changes or {})), **relations)
