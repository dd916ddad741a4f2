"""bnn_jax: train, compare and prototype binary neural networks in JAX and Flax.

The stages, in the order data flows; a file imports only from stages above it:

    schedules     step -> value                                   SCHEDULES
    estimators    step functions with a chosen derivative         ESTIMATORS, make_sign
    quantizers    real tensor -> integer codes and a scale        WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS
    bitops        XNOR and popcount on words of 32 bits           bnn_jax.bitops.bits, .matmul, .conv, .planes
    tracing       a computation as a graph                        bnn_jax.tracing.trace
    layers        Flax layers on codes                            BinaryConv, BinaryDense, BatchNorm
    models        networks by name                                MODELS
    losses        (logits, labels) -> a loss for each example     LOSSES
    distillation  student and teacher -> a loss                   DISTILLATION_LOSSES
    regularizers  latent weights and scales -> a penalty          REGULARIZERS
    optim         Deep Frank-Wolfe with a box, and its peers      deep_frank_wolfe, OPTIMIZERS
    data          image sets in memory, augmentation inside jit   load_dataset
    training      one run: config, loop, checkpoints              bnn_jax.training.loop, .callbacks
    stages        runs that start from, or are taught by, others  bnn_jax.stages.stage.run_stages
    sweeps        many runs: grids, comparisons, seeds            bnn_jax.sweeps.comparison
    packed        networks frozen to bits, their file             freeze, verify, save, load of bnn_jax.packed
    zoo           trained networks that come with the package      bnn_jax.zoo.load
    analysis      accounting, gradient paths, reports, pictures   bnn_jax.analysis.accounting, .gradient_paths
    run           a run as one object                             train(config, workdir) -> Run, load_run(folder)
"""

from etils import epy

__version__ = "0.1.0"

# What is named below is imported when it is first used: the command line and its helpers start without JAX.
with epy.lazy_api_imports(globals()):
    from bnn_jax import (  # noqa: F401
        analysis,
        bitops,
        convert,
        data,
        estimators,
        layers,
        losses,
        models,
        optim,
        packed,
        quantizers,
        regularizers,
        schedules,
        stages,
        sweeps,
        tracing,
        training,
        zoo,
    )
    from bnn_jax.data import load_dataset
    from bnn_jax.estimators import ESTIMATORS, Estimator, approx_sign, identity_sign, make_sign, sign, ste_sign
    from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
    from bnn_jax.losses import LOSSES, cross_entropy, make_loss, multiclass_hinge, smoothed_multiclass_hinge
    from bnn_jax.models import MODELS
    from bnn_jax.optim import OPTIMIZERS, bop, deep_frank_wolfe, keep_in_box, latent_box, make_optimizer, push_to_bounds
    from bnn_jax.quantizers import (
        ACTIVATION_QUANTIZERS,
        GRADIENT_QUANTIZERS,
        WEIGHT_QUANTIZERS,
        Quantized,
        Quantizer,
        make_quantizer,
        stateless,
        with_estimator,
    )
    from bnn_jax.regularizers import REGULARIZERS
    from bnn_jax.run import Run, load_run, train
    from bnn_jax.schedules import SCHEDULES, make_schedule

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "ESTIMATORS",
    "GRADIENT_QUANTIZERS",
    "LOSSES",
    "MODELS",
    "OPTIMIZERS",
    "REGULARIZERS",
    "SCHEDULES",
    "WEIGHT_QUANTIZERS",
    "BatchNorm",
    "BinaryConv",
    "BinaryDense",
    "Estimator",
    "Quantized",
    "Quantizer",
    "Run",
    "approx_sign",
    "bop",
    "cross_entropy",
    "deep_frank_wolfe",
    "identity_sign",
    "keep_in_box",
    "latent_box",
    "load_dataset",
    "load_run",
    "make_loss",
    "make_optimizer",
    "make_quantizer",
    "make_schedule",
    "make_sign",
    "multiclass_hinge",
    "push_to_bounds",
    "sign",
    "smoothed_multiclass_hinge",
    "stateless",
    "ste_sign",
    "train",
    "with_estimator",
]
