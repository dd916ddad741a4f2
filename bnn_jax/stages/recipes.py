"""Recipes: how papers train in several stages, as lists of :class:`Stage` made from one config.

The config gives the data, the batch size, the seed, and of its network the width, the stage sizes and the stem, given
or published; if its network is of the recipe's own family it is taken as it is.  Where one network counts blocks and
the other units, a stage keeps its number of convolutions.  Of a network that does not consist of blocks of two
convolutions the stage sizes are left out, and the width is taken if it is given.  A recipe sets all quantizers, and
refuses a config with quantizers of single layers, a gradient quantizer or XNOR-Net's map K.

The config's `epochs` are those of the longest stage, the others keep the paper's proportions.  Optimizers, learning
rates, schedules and decays are the papers' own or their programs', found for their batch sizes and data; what neither
says is called a reading.  Schedules are shares of a stage, so they keep their form at any length; rates that those
programs change every epoch change every step here.  Augmentation is that of the config.  `docs/recipes.md` has every
number beside its source.
"""

from collections.abc import Callable
from dataclasses import replace

from bnn_jax.names import name_of
from bnn_jax.quantizers import Quantizer
from bnn_jax.quantizers.progressive import clipped, committed
from bnn_jax.stages.parts import (
    ADAM,
    REAL,
    at_epochs,
    is_of,
    network_of,
    real_network,
    setting_of,
    stage_of,
    stage_sizes_of,
    taught_by_real,
)
from bnn_jax.stages.stage import Stage
from bnn_jax.training.config import Config, DistillationConfig, ModelConfig, OptimConfig

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
        return network_of(base, "bireal_resnet20", family=BI_REAL, activation=activation)

    binary = network_of(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    rate = 0.08 if "34" in binary.name else 0.01
    fine = OptimConfig("sgd", rate, latent_box=None, **at_epochs(20, 10, 15))
    return [
        stage_of(base, "relu", real("relu"), REAL),
        stage_of(base, "leaky_clip", real("leaky_clip"), fine, initialise_from="relu"),
        stage_of(base, "clip", real("clip"), fine, initialise_from="leaky_clip"),
        stage_of(base, "binary", binary, fine, initialise_from="clip"),
        stage_of(
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

    teacher  full precision: SGD 0.1; the paper's is a trained ResNet-34, as it is here for published stage sizes
    inputs   RSign, real weights: Adam 2.5e-3, linear to 0, weight decay 1e-5, coupled, of convolutions and shifts; 128
             epochs
    binary   both binary: the same without weight decay; 128 epochs

    ReActNet-A has the rate 1.25e-3, networks without normalization 5e-4 with adaptive clipping 0.02 (Chen
    et al., 2021, arXiv:2104.08215).

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    taught = DistillationConfig({"distribution": 1.0}, label_weight=0.0)
    kernels = "bn_free" if is_of(base.model, "reactnet18_bn_free") else "magnitude_aware"
    binary = network_of(base, "reactnet_resnet20", family="reactnet", inputs="rsign", kernels=kernels)
    if binary.name == "reactnet_resnet20":
        teacher = network_of(base, "resnet20", family="resnet")
    else:
        published = stage_sizes_of(binary) == stage_sizes_of(ModelConfig(binary.name))
        deeper = {"stage_sizes": (3, 4, 6, 3)} if published else {}
        teacher = network_of(base, "resnet34", family="resnet34", stem=setting_of(binary, "stem"), **deeper)
    rate, clipping = (5e-4, 0.02) if kernels == "bn_free" else (2.5e-3, None)
    rate = 1.25e-3 if binary.name == "reactnet_a" else rate
    adam = replace(ADAM, learning_rate=rate, schedule="linear", adaptive_clipping=clipping)
    decayed = replace(adam, weight_decay=1e-5, decay_only=("st*kernel", "*shift"))
    inputs = replace(binary, kernel_quantizer="full_precision")
    return [
        stage_of(base, "teacher", teacher, REAL),
        stage_of(base, "inputs", inputs, decayed, taught=taught, teacher="teacher"),
        stage_of(base, "binary", binary, adam, taught=taught, teacher="teacher", initialise_from="inputs"),
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
    binary = network_of(base, default, family="real_to_binary", inputs="ste_sign", kernels="binary")
    real = network_of(base, "resnet18", family="resnet18", stem=setting_of(binary, "stem"))
    inputs = replace(binary, kernel_quantizer="full_precision")
    tanh = replace(inputs, input_quantizer="full_precision")
    matching = DistillationConfig({"attention_mse": 30.0, "knowledge": 3.0})
    last = DistillationConfig({"knowledge": 0.8})
    slower = replace(
        ADAM,
        learning_rate=2e-4,
        warmup_share=5 / 75,
        latent_box=(-1.0, 1.0),
        **at_epochs(75, 40, 60, 70, factor=0.3),
    )
    adam = replace(slower, learning_rate=1e-3, weight_decay=2e-5, decay_only=("st*kernel",), latent_box=None)
    return [
        stage_of(base, "real", real, REAL),
        stage_of(base, "tanh", tanh, adam, epochs=0.75, taught=matching, teacher="real"),
        stage_of(base, "inputs", inputs, adam, epochs=0.75, taught=matching, teacher="tanh"),
        stage_of(base, "binary", binary, slower, epochs=0.75, taught=last, teacher="inputs", initialise_from="inputs"),
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
    binary = network_of(base, "irnet_resnet20", family="irnet", inputs="ede_sign", kernels="dir_net")
    sgd = OptimConfig("sgd", 0.1, weight_decay=1e-4, latent_weight_decay=1e-4, schedule="cosine", latent_box=None)
    return taught_by_real(base, real_network(binary), binary, sgd, DistillationConfig({"standardized": 1.0}))


def dgrl(base: Config) -> list[Stage]:
    """DGRL: every stage of a binary network with a real bottleneck learns from the same stage of a real network.

    real    Bi-Real Net's structure in full precision, with ReLU: SGD 0.1
    binary  approx_sign activations, magnitude_aware weights: SGD 0.1; labels 1, features 1

    The paper's teacher, settings and weight of the distillation could not be confirmed; this is a reading.

    Reference: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """
    binary = network_of(base, "dgrl_resnet18", family="dgrl", inputs="approx_sign", kernels="magnitude_aware")
    real = network_of(base, "bireal18", family="bireal18", stem=setting_of(binary, "stem"))
    return taught_by_real(base, real, binary, REAL, DistillationConfig({"features": 1.0}))


def ttq(base: Config) -> list[Stage]:
    """Trained ternary quantization: ternary weights from a full-precision network, each layer's scaled to [-1, 1].

    real     the config's network in full precision: as ternary
    ternary  ttq weights, real activations: SGD 0.1, x0.1 at 82, 123 and 150 of 400 epochs, weight decay 2e-4 of all
             kernels, latent ones too, and of the two levels of each layer

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    decays = {"weight_decay": 2e-4, "latent_weight_decay": 2e-4, "decay_only": ("*kernel",)}
    sgd = OptimConfig("sgd", 0.1, latent_box=None, **decays, **at_epochs(400, 82, 123, 150))
    levels = replace(sgd, decay_only=("*kernel", "*positive_scale", "*negative_scale"))
    ternary = replace(real_network(base.model), kernel_quantizer="ttq")
    return [
        stage_of(base, "real", real_network(base.model), sgd),
        stage_of(base, "ternary", ternary, levels, initialise_from="real", transfer="normalized"),
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
    powers = replace(real_network(base.model), kernel_quantizer="inq")
    return [
        stage_of(base, "real", real_network(base.model), REAL),
        stage_of(base, "powers", powers, sgd, initialise_from="real"),
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
    binary = network_of(base, "bireal_resnet20", family=BI_REAL, inputs="swish_sign", kernels="bnn_plus")
    binary = replace(
        binary,
        input_quantizer_options={"beta": 5.0},
        kernel_quantizer_options={"beta": 5.0, "initial": "median" if regularizer == "manhattan" else "mean"},
    )
    real = network_of(base, "bireal_resnet20", family=BI_REAL, activation="clip")
    adam = replace(ADAM, learning_rate=1e-3, **at_epochs(50, 10, 20, 30, 40))
    drawn = {"regularizer": regularizer, "regularizer_strength": 1e-6}
    return [
        stage_of(base, "real", real, replace(REAL, **at_epochs(120, 30, 60, 90))),
        stage_of(base, "binary", binary, adam, epochs=50 / 120, initialise_from="real", changes=drawn),
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
    binary = network_of(base, "bireal_resnet20", family=BI_REAL, inputs="approx_sign", kernels="magnitude_aware")
    inputs = replace(binary, kernel_quantizer="full_precision")
    adam = replace(ADAM, learning_rate=3e-4, schedule="linear")
    probe = OptimConfig("sgd", 0.1, latent_box=None, train_only=("head/*",), **at_epochs(100, 60, 80))
    last = {"teacher": "teacher", "which": "last"}
    return [
        stage_of(base, "teacher", real_network(binary), REAL),
        stage_of(base, "inputs", inputs, adam, taught=taught, **last),
        stage_of(base, "binary", binary, adam, taught=taught, initialise_from="inputs", **last),
        stage_of(
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
    real_weights = is_of(base.model, "binaryduo_vgg7")
    kernels = {} if real_weights else {"kernels": "dorefa", "kernel_options": {"bits": 1}}
    first = network_of(base, "binaryduo_resnet18", family="binaryduo", inputs="coupled", coupled=True, **kernels)
    second = network_of(base, "binaryduo_resnet18", family="binaryduo", inputs="decoupled", coupled=False, **kernels)
    decays = {"weight_decay": 1e-4, "latent_weight_decay": 1e-4}
    sgd = OptimConfig("sgd", 0.1, options={"nesterov": True}, latent_box=None, **decays, **at_epochs(120, 70, 90, 110))
    fine = replace(sgd, learning_rate=0.01, **at_epochs(40, 20, 30, 35))
    return [
        stage_of(base, "coupled", first, sgd),
        stage_of(base, "decoupled", second, fine, epochs=1 / 3, initialise_from="coupled", transfer="decoupled"),
    ]


IR_NET = ("irnet", "rbnn")
"""Beginnings of the names of the networks with hard tanh behind every convolution."""


def _warmed_up(rate: float, epochs: int, decay: float) -> OptimConfig:
    """RBNN's, ReCU's and BiPer's schedule: a fifth to all of the rate in four of the epochs, then a cosine."""
    warm_up = {"warmup_share": 4 / epochs, "warmup_start_share": 0.2, "schedule": "cosine"}
    return OptimConfig("sgd", rate, weight_decay=decay, latent_weight_decay=decay, latent_box=None, **warm_up)


def rbnn(base: Config) -> list[Stage]:
    """RBNN: rotated weights, and activations standardized for each example.

    binary  rbnn weights and activations: SGD 0.1, 4 epochs of warm-up from a fifth, then cosine, weight decay 1e-4 of
            all parameters, the latent weights and the angles too; 1000 epochs

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055; lmbxmu/RBNN.
    """
    binary = network_of(base, "rbnn_resnet20", family=IR_NET, inputs="rbnn", kernels="rbnn")
    return [stage_of(base, "binary", binary, _warmed_up(0.1, 1000, 1e-4))]


def biper(base: Config, *, frequency: float = 20.0) -> list[Stage]:
    """BiPer: activations are binary first, with a sine of the weights in their place, then its sign.

    periodic  the sine of the latent weights, real, and binary activations: SGD 0.021, 4 epochs of warm-up from a fifth,
              then cosine, weight decay 1.6e-3 of all parameters; 600 epochs
    binary    the sign of the sine: the same from 3.7e-3, weight decay 1.6e-4; 300 epochs

    The numbers are those of the authors' example for ResNet-18 on CIFAR-10, which adds to the loss 0.037 and 0.0468
    times the mean of sin^2(frequency w) of each layer; here it is left out.

    Args:
      frequency: of the sine.

    Reference: Vargas et al., BiPer: Binary Neural Networks using a Periodic Function, CVPR 2024, arXiv:2404.01278;
    edmav4/BiPer.
    """
    shortcut = {} if is_of(base.model, IR_NET) else {"shortcut": "pool"}
    networks = [
        network_of(
            base,
            "irnet_resnet20",
            family=IR_NET,
            inputs="recu",
            kernels="biper",
            kernel_options={"frequency": frequency, "stage": stage},
            **shortcut,
        )
        for stage in (1, 2)
    ]
    binary = {"epochs": 300 / 600, "initialise_from": "periodic"}
    return [
        stage_of(base, "periodic", networks[0], _warmed_up(0.021, 600, 1.6e-3)),
        stage_of(base, "binary", networks[1], _warmed_up(3.7e-3, 300, 1.6e-4), **binary),
    ]


def stompp(base: Config) -> list[Stage]:
    """StoMPP: from the input to the output, clipped weights and activations turn into their signs, at random.

    stage1, ...  as many as the network has: those before it are committed, signs without a gradient; in it the share of
                 signs rises from 0 to 1, without an estimator; those behind it are clipped: SGD 0.1, cosine

    The paper goes layer by layer within one training; that a stage of the network is the unit here, each with a
    schedule and the epochs of its own, and the optimizer are a reading.  Shortcuts that stay real do so throughout.

    Reference: Smith, Islam, Layerwise Progressive Freezing Enables STE-Free Training of Deep Binary Neural Networks,
    2026, arXiv:2601.22660.
    """
    network = network_of(base, "bireal_resnet20", family=BI_REAL, inputs="progressive", kernels="progressive")
    names = [f"stage{number}" for number in range(1, len(stage_sizes_of(network)) + 1)]
    sgd = OptimConfig("sgd", 0.1, schedule="cosine", latent_box=None)
    stages: list[Stage] = []
    for number, name in enumerate(names):
        others = {f"{other}_*/conv*": _both(committed) for other in names[:number]}
        others |= {f"{other}_*/conv*": _both(clipped) for other in names[number + 1 :]}
        before = {"initialise_from": names[number - 1], "which": "last"} if number else {}
        stages.append(stage_of(base, name, replace(network, quantizers=others), sgd, **before))
    return stages


def _both(quantizer: Callable[[], Quantizer]) -> dict[str, str]:
    """The quantizers of a layer, both made by the same function."""
    return dict.fromkeys(("input_quantizer", "kernel_quantizer"), name_of(quantizer))


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
    "rbnn": rbnn,
    "biper": biper,
    "stompp": stompp,
}
"""name -> function of a config that makes the list of stages."""
