"""Networks on bfloat16 images: what is bfloat16, what stays float32, and that they train as in float32."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import INSTANCES, UNREAD, compiled, image_shape, small

from bnn_jax.losses import cross_entropy
from bnn_jax.models import MODELS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.tracing.interpret import default_branch
from bnn_jax.training.experiment import make_model

LAST = ("head", "head_norm", "")
"""Modules of float32 outputs, by path: the last layer, the normalization of the logits, the network itself."""


def equations(jaxpr, stack: str = "") -> Iterator[tuple[str, jax.extend.core.JaxprEqn]]:
    """All equations with the names of the transformations and modules around them; of products on bits the numbers'."""
    for equation in jaxpr.eqns:
        names = f"{stack}/{equation.source_info.name_stack}"
        yield names, equation
        on_bits = "population_count" in str(equation.params.get("branches"))
        inside = {"branches": (default_branch(equation),)} if on_bits else equation.params
        for inner in jax.extend.core.jaxprs_in_params(inside):
            yield from equations(inner, names)


def products(jaxpr) -> list[tuple[bool, tuple[str, str], str, list[tuple[int, ...]]]]:
    """(in the backward pass, dtypes of the operands, dtype of the result, all shapes) of each convolution and dot."""
    return [
        (
            "transpose(" in names,
            tuple(operand.aval.dtype.name for operand in equation.invars),
            equation.outvars[0].aval.dtype.name,
            [variable.aval.shape for variable in (*equation.invars, *equation.outvars)],
        )
        for names, equation in equations(jaxpr)
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]


def traced_gradient(model: nn.Module, images: jax.ShapeDtypeStruct):
    """The jaxpr of (logits, intermediates), the gradient and the updated state; its variables and what modules pass."""
    rngs = {"params": jax.random.key(0), "quantizer": jax.random.key(1)}
    variables = jax.eval_shape(lambda x: model.init(rngs, x, train=False), images)
    passed: dict[str, set[str]] = {}

    def remember(call, arguments, options, context):
        result = call(*arguments, **options)
        if context.method_name == "__call__":
            tensors = [leaf for leaf in jax.tree.leaves((arguments, result)) if jnp.ndim(leaf)]
            passed.setdefault("/".join(context.module.path), set()).update(leaf.dtype.name for leaf in tensors)
        return result

    def gradient(variables, x):
        state = {name: collection for name, collection in variables.items() if name != "params"}

        def loss(params):
            with nn.intercept_methods(remember):
                outputs, updated = model.apply(
                    {"params": params} | state, x, train=True, progress=0.5, mutable=list(state), rngs=rngs
                )
            return outputs[0].sum(), (outputs, updated)

        (_, (outputs, updated)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return outputs, gradient, updated

    closed, shapes = jax.make_jaxpr(gradient, return_shape=True)(variables, images)
    return closed.jaxpr, shapes, variables, passed


def dtypes(tree) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


IN_GROUPS = {"meliusnet22", "pokebnn"}
"""Networks of whose convolutions in groups some products stand in the gradients alone."""
OF_ATTENTION = {"vit_tiny": 2, "bitnet_lm": 2}


@pytest.mark.parametrize("name", compiled(sorted(INSTANCES.values())))
def test_bfloat16_images_make_bfloat16_activations(name):
    """By tracing, from images to gradients."""
    model = make_model(small(name), num_classes=5)
    images = jax.ShapeDtypeStruct((4, *image_shape(name)), jnp.bfloat16)
    jaxpr, shapes, variables, passed = traced_gradient(model, images)
    (logits, intermediates), gradient, updated = shapes

    assert logits.dtype == jnp.float32 and dtypes(intermediates) == {"bfloat16"}
    assert dtypes(variables["params"]) == dtypes(gradient) == {"float32"}
    assert "bfloat16" not in dtypes(updated)
    # Nothing that one module hands to another is float32, in either direction, before the last layer.
    assert {path: kinds for path, kinds in passed.items() if path not in LAST and kinds != {"bfloat16"}} == {}

    wide = [product for product in products(jaxpr) if product[1] == ("float32", "float32")]
    of_head = [product for product in wide if any(5 in shape for shape in product[-1])]
    assert len(of_head) == 3 and (of_head == wide or name.startswith("rbnn"))  # which rotates its weights
    narrow = [product for product in products(jaxpr) if product not in wide]
    assert {operands for _, operands, _, _ in narrow} == {("bfloat16", "bfloat16")}
    # Sums are float32, in layers and gradients of kernels; the gradient of each layer's inputs comes out bfloat16.
    assert {result for backward, _, result, _ in narrow if not backward} == {"float32"}
    of_inputs = sum(result == "bfloat16" for backward, _, result, _ in narrow if backward)
    unread = sum("kernel" in path for path in UNREAD.get(name, []))
    # Both factors of the two products of an attention are activations.
    layers = sum(not backward for backward, *_ in narrow) - unread + OF_ATTENTION.get(name, 0)
    assert 0 < of_inputs == layers or (of_inputs > layers and name in IN_GROUPS)


def test_float32_images_are_not_converted():
    """Between float32 images, parameters, logits and gradients nothing changes its dtype."""
    model = make_model(small("real_to_binary_baseline_resnet18"), num_classes=5)
    jaxpr, *_ = traced_gradient(model, jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32))
    converted = [
        names
        for names, equation in equations(jaxpr)
        if equation.primitive.name == "convert_element_type"
        and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating)
        and equation.invars[0].aval.dtype != equation.outvars[0].aval.dtype
    ]
    assert converted == []


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.full
def test_training_in_bfloat16_keeps_up_with_float32():
    """A residual binary network on one batch, 40 steps of Adam: the losses of the last ten differ by at most 0.05.

    Single steps differ by more: a rounded activation near 0 has another sign, in either of the two.
    """
    model = MODELS["resnet6"].constructor(
        num_classes=5,
        width=8,
        input_quantizer=ACTIVATION_QUANTIZERS["ste_sign"](),
        kernel_quantizer=WEIGHT_QUANTIZERS["xnor"](),
    )
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(64) % 5)
    images = jnp.asarray(rng.normal(size=(5, 8, 8, 1))[labels] + rng.normal(size=(64, 8, 8, 1)), jnp.float32)
    optimizer = optax.adam(0.01)

    @jax.jit
    def train(images):
        variables = model.init(jax.random.key(0), images, train=False)

        def step(carry, _):
            params, stats, opt_state = carry

            def loss(params):
                (logits, _), updated = model.apply(
                    {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
                )
                return cross_entropy(logits, labels).mean(), updated["batch_stats"]

            (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), stats, opt_state), value

        params = variables["params"]
        return jax.lax.scan(step, (params, variables["batch_stats"], optimizer.init(params)), length=40)

    (params, stats, _), losses = train(images.astype(jnp.bfloat16))
    _, expected = train(images)
    assert dtypes((params, stats)) == {"float32"}
    assert losses[:2].mean() > 1.5 and losses[-10:].mean() < 0.3
    assert abs(losses[-10:].mean() - expected[-10:].mean()) < 0.05
