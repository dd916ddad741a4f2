"""The flat graph of a function: nothing is lost, nothing stays nested, and codes are told from real numbers."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct, lax
from jax.ad_checkpoint import checkpoint_name

from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, Mark, make_quantizer, mark
from bnn_jax.tracing.trace import multiply_accumulates, products, trace

SIGN = make_quantizer(ACTIVATION_QUANTIZERS, "ste_sign")
XNOR = make_quantizer(WEIGHT_QUANTIZERS, "xnor")
X = jnp.ones((3, 4))


def primitives(traced):
    return [operation.primitive for operation in traced.operations]


@jax.custom_jvp
def chosen(x):
    return jnp.exp(x)


chosen.defjvp(lambda primals, tangents: (chosen(*primals), tangents[0]))


@jax.custom_vjp
def chosen_twice(x):
    return chosen(jnp.sin(x)), jnp.cos(x)


chosen_twice.defvjp(lambda x: (chosen_twice(x), None), lambda _, g: (g[0] + g[1],))


@pytest.mark.parametrize(
    "call",
    [
        jax.jit,
        jax.checkpoint,
        partial(jax.checkpoint, prevent_cse=False),
        lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
    ],
)
def test_calls_are_replaced_by_their_insides(call):
    traced = trace(lambda x: call(lambda y: jnp.tanh(jnp.exp(y)))(x) + x, X)
    assert primitives(traced) == ["exp", "tanh", "add"]
    exp, tanh, add = traced.operations
    assert exp.inputs == (traced.arguments["0"],)
    assert tanh.inputs == exp.outputs
    assert add.inputs == (*tanh.outputs, traced.arguments["0"])
    assert traced.outputs == add.outputs


def test_calls_with_a_chosen_derivative_are_listed_with_their_insides():
    traced = trace(lambda x: chosen_twice(x + 1.0), X)
    assert primitives(traced) == ["add", "sin", "exp", "cos"]
    add, sin, exp, cos = traced.operations
    inner, outer = traced.chosen
    assert inner == (sin.outputs, exp.outputs, 2, 3)
    assert outer == (add.outputs, exp.outputs + cos.outputs, 1, 4)


def test_arguments_are_named_by_their_path_and_keep_their_shapes():
    params = {"params": {"conv1": {"latent_kernel": ShapeDtypeStruct((3, 3, 1, 2), jnp.bfloat16)}}, "list": [X]}
    traced = trace(lambda p, x: (x, p["list"][0]), params, X)
    assert set(traced.arguments) == {"0/list/0", "0/params/conv1/latent_kernel", "1"}
    kernel = traced.values[traced.arguments["0/params/conv1/latent_kernel"]]
    assert (kernel.shape, kernel.dtype) == ((3, 3, 1, 2), jnp.bfloat16)
    assert traced.outputs == (traced.arguments["1"], traced.arguments["0/list/0"])
    assert traced.operations == ()


def test_every_value_is_made_before_it_is_read():
    traced = trace(lambda x: lax.scan(lambda c, y: (c + y, jnp.sin(c)), x[0], x), X, unroll=True)
    made = set(traced.arguments.values())
    results = {value for operation in traced.operations for value in operation.outputs}
    for operation in traced.operations:
        assert not set(operation.inputs) & results - made
        made |= set(operation.outputs)
    assert set(traced.outputs) <= made


def test_all_branches_of_a_cond_stand_side_by_side():
    traced = trace(lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, lambda x: x], x), 1, X)
    names = primitives(traced)
    assert [name for name in names if name in ("sin", "cos", "branch_join")] == ["sin", "cos", "branch_join"]
    sin, cos, join = traced.operations[-3:]
    assert join.inputs == (*sin.outputs, *cos.outputs, traced.arguments["1"])
    assert join.outputs == traced.outputs


def nested_scan(x):
    inner = lambda c, _: (jnp.sin(c), None)
    outer = lambda c, _: (lax.scan(inner, jnp.cos(c), None, length=3)[0], c)
    return lax.scan(outer, x, None, length=5)


def test_the_body_of_a_scan_repeats():
    traced = trace(nested_scan, X)
    assert [(o.primitive, o.repeats) for o in traced.operations] == [("cos", 5), ("sin", 15), ("scan_stack", 1)]
    assert traced.values[traced.outputs[1]].shape == (5, 3, 4)


def test_an_unrolled_scan_runs_through_its_carry():
    traced = trace(nested_scan, X, unroll=True)
    assert primitives(traced) == (["cos"] + ["sin"] * 3) * 5 + ["scan_stack"]
    assert {operation.repeats for operation in traced.operations} == {1}
    *steps, stack = traced.operations
    assert steps[0].inputs == (traced.arguments["0"],)
    for before, after in pairwise(steps):
        assert after.inputs == before.outputs
    carried = [traced.arguments["0"], *(steps[i].outputs[0] for i in (3, 7, 11, 15))]
    assert stack.inputs == tuple(carried)
    assert traced.outputs == (*steps[-1].outputs, *stack.outputs)


def test_a_scan_without_steps_returns_what_it_was_given():
    traced = trace(lambda x: lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=0), X, unroll=True)
    assert traced.outputs[0] == traced.arguments["0"]
    assert primitives(traced) == ["scan_stack"]


def test_a_while_loop_stands_once():
    traced = trace(lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y * y, x), X)
    assert primitives(traced) == ["reduce_sum", "lt", "mul"]
    assert traced.outputs == traced.operations[-1].outputs
    assert {operation.repeats for operation in traced.operations} == {1}


@pytest.mark.parametrize(
    "function, primitive",
    [
        (lambda x: x.at[0].add(1.0), "scatter-add"),
        (lambda x: x.at[0].set(1.0), "scatter"),
        (lambda x: lax.reduce(x, jnp.float32(1), lambda a, b: a * b + a, (0,)), "reduce"),
        (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"), "reduce_window_max"),
    ],
)
def test_functions_that_combine_two_numbers_stay_inside_their_operation(function, primitive):
    names = primitives(trace(function, X))
    assert names.count(primitive) == 1
    assert names[-1] == primitive


def test_an_unknown_operation_with_functions_inside_is_named():
    def solve(x):
        return lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: b / 2, symmetric=True)

    with pytest.raises(
        NotImplementedError, match=r"'\w*linear_solve' at 'solver' carries \d functions, \d of which fit"
    ):
        trace(jax.named_scope("solver")(solve), X[0])


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, conv in {"plain": BinaryConv, "saved": nn.remat(BinaryConv)}.items():
            x = conv(5, pad_value=1, input_quantizer=SIGN, kernel_quantizer=XNOR, name=name)(x)
        return BinaryDense(2, name="head")(x.mean((1, 2)))


def products_of(module, shape):
    x = ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    traced = trace(module.apply, variables, x)
    return traced, products(traced)


def test_products_of_a_network():
    traced, (plain, saved, head) = products_of(Two(), (2, 8, 6, 3))
    codes = Mark("input_quantizer", 2), Mark("kernel_quantizer", 2)
    assert (plain.left.mark, plain.right.mark) == (saved.left.mark, saved.right.mark) == codes
    assert (head.left.mark, head.right.mark) == (None, None)
    assert [product.operation.path for product in (plain, saved, head)] == ["Two/plain", "Two/saved", "Two/head"]
    first, second, last = (f"0/params/{name}" for name in ("plain/latent_kernel", "saved/latent_kernel", "head/kernel"))
    assert (plain.left.arguments, plain.right.arguments) == ({"1"}, {first})
    assert (saved.left.arguments, saved.right.arguments) == ({"1", first}, {second})
    assert (head.left.arguments, head.right.arguments) == ({"1", first, second}, {last})
    costs = [multiply_accumulates(product.operation, traced.values) for product in (plain, saved, head)]
    assert costs == [2 * 8 * 6 * 9 * 3 * 5, 2 * 8 * 6 * 9 * 5 * 5, 2 * 5 * 2]


MOVES = {
    "nothing": lambda x: x,
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1)), constant_values=-1.0)[:, :4],
    "reshape": lambda x: x.reshape(4, 3).reshape(3, 4),
    "transpose": lambda x: x.T.reshape(3, 4),
    "cast": lambda x: x.astype(jnp.int8).astype(jnp.float32),
    "slice": lambda x: x[:, :4],
    "dynamic slice": lambda x: lax.dynamic_slice(x, (0, 0), (3, 4)),
    "reverse": jnp.flip,
    "squeeze": lambda x: jnp.broadcast_to(x[None], (1, 3, 4)).squeeze(0),
    "concatenate": lambda x: jnp.concatenate([x[:1], x[1:]]),
    "jit": jax.jit(lambda x: x.T.reshape(3, 4)),
    "own name": lambda x: checkpoint_name(x, "kept"),
}
CHANGES = {
    "scale": lambda x: x * 2,
    "sum": lambda x: x + x,
    "concatenate with real": lambda x: jnp.concatenate([x[:1], jnp.ones((2, 4))]),
    "concatenate with others": lambda x: jnp.concatenate([x[:1], mark(x[1:], "input_quantizer", values=2)]),
    "selection": lambda x: jnp.where(x > 0, x, 0.5),
    "marked as scale": lambda x: mark(x + 1, "input_quantizer"),
}


def left_mark(move):
    traced = trace(lambda x, w: move(mark(x, "input_quantizer", values=3)) @ w, X, X.T)
    (product,) = products(traced)
    return product.left.mark


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moving_codes_leaves_codes(move):
    assert left_mark(move) == Mark("input_quantizer", 3)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_arithmetic_on_codes_leaves_real_numbers(change):
    assert left_mark(change) is None


def test_codes_pass_into_a_scan():
    def function(x, kernels):
        codes = mark(kernels, "kernel_quantizer", values=2)
        return lax.scan(lambda y, w: (mark(y, "input_quantizer", values=2) @ w, None), x, codes)[0]

    (product,) = products(trace(function, X, jnp.ones((7, 4, 4))))
    assert product.right.mark == Mark("kernel_quantizer", 2)
    assert product.operation.repeats == 7


def conv(x, kernel, *, strides=(1, 1), padding="SAME", numbers=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    "function, left, right, expected",
    [
        (conv, (2, 8, 6, 3), (3, 3, 3, 5), 2 * 48 * 9 * 3 * 5),
        (partial(conv, strides=(2, 2)), (2, 8, 6, 3), (3, 3, 3, 5), 2 * 12 * 9 * 3 * 5),
        (partial(conv, padding="VALID"), (2, 8, 6, 3), (3, 5, 3, 5), 2 * 6 * 2 * 15 * 3 * 5),
        (partial(conv, feature_group_count=4), (2, 8, 6, 4), (3, 3, 1, 8), 2 * 48 * 9 * 8),
        (partial(conv, numbers=("NCHW", "OIHW", "NCHW")), (2, 3, 8, 6), (5, 3, 3, 3), 2 * 48 * 9 * 3 * 5),
        (jnp.matmul, (2, 7), (7, 5), 2 * 7 * 5),
        (jnp.matmul, (4, 2, 7), (4, 7, 5), 4 * 2 * 7 * 5),
        (partial(jnp.einsum, "bhwc,bhwf->cf"), (2, 3, 4, 5), (2, 3, 4, 6), 2 * 3 * 4 * 5 * 6),
    ],
)
def test_multiply_accumulates(function, left, right, expected):
    traced = trace(function, *(ShapeDtypeStruct(shape, jnp.float32) for shape in (left, right)))
    (product,) = products(traced)
    assert multiply_accumulates(product.operation, traced.values) == expected
