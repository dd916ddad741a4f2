"""How estimators are made, named, documented, and refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import estimators as package
from bnn_jax.estimators import (
    ESTIMATORS,
    Estimator,
    as_estimator,
    dir_sign,
    ede_schedule,
    fda_schedule,
    fda_sign,
    gumbel_schedule,
    heaviside,
    make_estimator,
    make_sign,
    rbnn_schedule,
    ste_sign,
    swish_sign,
)
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, make_quantizer


def test_make_sign_from_a_derivative():
    estimator = make_sign(lambda x, temperature: 1 / jnp.cosh(x / temperature) ** 2)
    x = jnp.array([-1.0, 0.0, 2.0])
    gradient = jax.grad(lambda x: estimator(x, temperature=2.0).sum())(x)
    np.testing.assert_allclose(gradient, 1 / np.cosh(np.array([-0.5, 0.0, 1.0])) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(estimator(x, temperature=2.0), [-1, 1, 1])
    assert jax.grad(make_sign(lambda x: 1.0))(0.3) == 1


def test_make_sign_with_a_trained_parameter():
    estimator = make_sign(
        lambda x, slope: slope * jnp.ones_like(x), parameter_derivatives={"slope": lambda x, slope: x}
    )
    gradient = jax.grad(lambda slope: estimator(jnp.array([1.0, 2.0, 4.0]), slope=slope).sum())(3.0)
    assert gradient == 7


def test_make_estimator_with_other_codes():
    halves = make_estimator(lambda x, step: jnp.floor(x / step), lambda x, step: 1 / step)
    np.testing.assert_array_equal(halves(jnp.array([-0.1, 0.7, 1.0]), step=0.5), [-1, 1, 2])
    assert jax.grad(halves)(0.7, step=0.5) == 2


def test_a_parameter_for_each_channel():
    clips = jnp.array([0.5, 1.5])
    slopes = jax.grad(lambda x: ste_sign(x, clip_value=clips).sum())(jnp.ones((4, 3, 2)))
    np.testing.assert_array_equal(slopes, np.broadcast_to([0.0, 1.0], (4, 3, 2)))


def test_a_name_a_record_and_a_function_stand_for_the_same_estimator():
    for name, estimator in ESTIMATORS.items():
        assert as_estimator(name) is as_estimator(estimator) is as_estimator(estimator.apply) is estimator
    own = lambda x: jnp.sign(x)
    assert as_estimator(own) == Estimator(own, (-1, 1), None, (), False)


def test_a_partial_has_the_record_of_its_function():
    """Codes, schedule and trained parameters; nested, of a record, and the partial of another function."""
    narrow = partial(heaviside, width=2.0)
    assert as_estimator(narrow) == ESTIMATORS["heaviside"]._replace(apply=narrow)
    found = as_estimator(partial(partial(ESTIMATORS["ternary"], straight_through=True), delta=0.5))
    assert found == ESTIMATORS["ternary"]._replace(apply=found.apply)
    assert found.apply.func is package.ternary
    assert found.apply.keywords == {"straight_through": True, "delta": 0.5}
    bounded = partial(package.rbnn_sign)
    assert package.of_inputs(bounded).schedule is ESTIMATORS["rbnn_sign"].input_schedule
    own = partial(lambda x, width: jnp.sign(x), width=1.0)
    assert as_estimator(own) == Estimator(own)
    assert as_estimator(Estimator(partial(package.ede_sign, t=2.0))).schedule is None


@pytest.mark.parametrize("estimator", [swish_sign, ESTIMATORS["swish_sign"]], ids=["function", "record"])
def test_a_partial_learns_and_names_its_parameters(estimator):
    make = partial(make_quantizer, ACTIVATION_QUANTIZERS, trainable=True)
    start = make(partial(estimator, beta=2.0)).init(jax.random.key(0), jnp.ones((1, 2)))
    assert start == {"beta": 2.0}
    with pytest.raises(ValueError, match=r"`option` \(='btaa'\) is not known; did you mean 'beta'\?"):
        make(partial(estimator, beta=2.0), btaa=1.0)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"widht": 1.0}, r"^`widht` is not a parameter of this estimator; it takes width, height$"),
        ({"height": 2.0}, r"^`width` must be given to this estimator, whose derivative needs it; as width=1.0$"),
    ],
)
def test_parameters_that_the_derivative_does_not_take_are_refused(parameters, text):
    triangle = make_sign(lambda x, width, *, height=1.0: jnp.maximum(0.0, height - jnp.abs(x) / width))
    assert triangle(0.5, width=1.0) == triangle(0.5, width=1.0, height=2.0) == 1
    with pytest.raises(TypeError, match=text):
        triangle(0.5, **parameters)


def test_derivatives_of_any_signature():
    assert jax.grad(make_sign(lambda x, **scales: scales["width"] + 0 * x))(0.5, width=2.0) == 2
    assert jax.grad(make_sign(jnp.cos))(0.0) == 1
    assert jax.grad(make_sign(lambda *x: x[0]))(0.5) == 0.5
    with pytest.raises(TypeError, match=r"^`width` is not a parameter of this estimator; it takes none$"):
        make_sign(jnp.cos)(0.0, width=2.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (partial(ste_sign, clip_value=0), r"`clip_value` \(=0\) must be positive; 1\.0 is the usual choice"),
        (partial(dir_sign, eps=0.0), r"`eps` \(=0\.0\) must be in \(0, 1\]; 0\.1 is usual"),
        (partial(fda_sign, frequency=4), r"`frequency` \(=4\) must be in \(0, pi\); 0\.1 is usual"),
        (partial(heaviside, rho=-0.1), r"`rho` \(=-0\.1\) must be at least 0; 0\.3 is usual"),
        (partial(package.ternary, delta=-1), r"`delta` \(=-1\) must be at least 0; 0\.5 mean\|x\| is usual"),
        (
            partial(ste_sign, clip_value=np.ones(2)),
            r"`clip_value` \(of shape \(2,\)\) must broadcast to x, of shape \(3,",
        ),
        (partial(swish_sign, beta=np.ones((1, 3))), r"`beta` \(of shape \(1, 3\)\) must broadcast to x"),
        (lambda x: ede_schedule(1.5), r"`progress` \(=1\.5\) must be in \[0, 1\]; give step / total_steps"),
        (lambda x: fda_schedule(-0.1), r"`progress` \(=-0\.1\) must be in \[0, 1\]"),
        (lambda x: rbnn_schedule(0.5, t_min=0), r"`t_min` \(=0\) must be positive; 0\.1 is usual"),
        (lambda x: gumbel_schedule(0.5, end=-1), r"`end` \(=-1\) must be positive"),
        (
            lambda x: as_estimator("swishsign"),
            r"`estimator` \(='swishsign'\) is not known; did you mean 'swish_sign'\?",
        ),
        (
            lambda x: as_estimator(partial(partial(package.ede_sign, k=1.0))),
            r"^`k` \(=1\.0\) of an estimator must not be fixed by a partial, for training sets it; `Estimator` of the",
        ),
        (lambda x: as_estimator(partial(package.gumbel_sign, key=0)), r"^`key` \(=0\) of an estimator must not be"),
        (lambda x: as_estimator(3), r"`estimator` \(=3\) must be a name, an Estimator or a function x -> codes"),
    ],
)
def test_error_texts(call, text):
    with pytest.raises(ValueError, match=text):
        call(jnp.ones(3))


@pytest.mark.parametrize("name", ["sign", "make_sign", "make_estimator", *ESTIMATORS])
def test_both_formulas_are_documented(name):
    text = getattr(package, name).__doc__
    assert "Forward   " in text and "Backward  " in text and ">>>" in text
    assert "Reference: " in text or name not in ESTIMATORS
