"""Attention: one-bit scores against float64 twins of the papers' formulas, on bits too; rotary positions; the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import exact, normal, random_variables

from bnn_jax.layers import Normalized, SelfAttention, rotary, sign_products

KEY = jax.random.key(0)


def softmax(scores):
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def binary_attention(x, params, grid, heads):
    """BinaryAttention's formulas, example by example and head by head, with real projections and a norm behind."""
    kernel = lambda name: params[name]["dense"]["kernel"]
    size = kernel("query").shape[1] // heads
    outputs = []
    for tokens in x:
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            q, k, v = (tokens @ kernel(name)[:, own] for name in ("query", "key", "value"))
            bits = [np.where(a < 0, -1.0, 1.0) for a in (q, k)]
            scores = np.abs(q).mean() * np.abs(k).mean() * (bits[0] @ bits[1].T) / np.sqrt(size)
            for i, j in np.ndindex(*scores.shape):
                (a, b), (c, d) = divmod(i, grid[1]), divmod(j, grid[1])
                place = (a - c + grid[0] - 1) * (2 * grid[1] - 1) + (b - d + grid[1] - 1)
                scores[i, j] += params["bias_table"][place, head]
            shares = softmax(scores)
            if "share_scale" in params:
                a, b = params["share_scale"], params["value_scale"]
                shares, v = a * (shares > a / 2), b * np.where(v < 0, -1, 1)
            parts.append(shares @ v)
        y = np.concatenate(parts, -1)
        y = y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
        outputs.append((y * params["out_norm"]["scale"] + params["out_norm"]["bias"]) @ kernel("out"))
    return np.stack(outputs)


@pytest.mark.parametrize("binary_values", [False, True])
def test_binary_attention_is_the_papers_formula(binary_values):
    """BinaryAttention's scores; and BiT's shares and values of one bit."""
    attention, x = SelfAttention(2, binary_scores=True, grid=(2, 3), binary_values=binary_values), normal(2, 6, 8)
    variables = random_variables(attention, x)
    if binary_values:
        assert attention.init(KEY, x)["params"]["share_scale"] == np.float32(4 / 6)
        variables["params"] |= {"share_scale": np.float32(0.4), "value_scale": np.float32(0.7)}
    found = attention.apply(variables, x)
    expected = binary_attention(exact(x), exact(variables["params"]), (2, 3), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_binary_scores_is_that_of_scale_times_clipped_sign():
    """By q: d/dq of mean|q| (sign q) . K, where the sign passes the gradient on [-1, 1]; in float64 by hand."""
    q, k = 2 * normal(3, 4, seed=1), normal(3, 4, seed=2)
    attention = SelfAttention(heads=1, binary_scores=True, head_size=4)
    scores = lambda q: attention.apply({}, q, k[None, None], method="_binary_scores")
    g = normal(1, 1, 3, 3, seed=3)
    found = jax.grad(lambda q: (scores(q) * g).sum())(q[None, None])[0, 0]
    q, k, g = (exact(a) for a in (q, k, g[0, 0]))
    sign = lambda a: np.where(a < 0, -1.0, 1.0)
    s_k = np.abs(k).mean() / 2
    of_signs = s_k * (g @ sign(k))
    expected = np.abs(q).mean() * of_signs * (np.abs(q) <= 1) + sign(q) / q.size * (of_signs * sign(q)).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [45, pytest.param(32, marks=pytest.mark.full)])
def test_sign_products_on_bits_are_the_same_integers(size):
    rng = np.random.default_rng(size)
    q, k = (jnp.asarray(rng.choice([-1.0, 1.0], (2, 3, n, size)), jnp.float32) for n in (4, 5))
    expected = np.einsum("bhqc,bhkc->bhqk", q, k)
    np.testing.assert_array_equal(sign_products(q, k), expected)
    on_bits = sign_products(q, k, on_bits=True)
    assert on_bits.dtype == jnp.int32
    np.testing.assert_array_equal(on_bits, expected)


def test_rotary_turns_pairs_and_leaves_products_to_the_distance():
    x = normal(1, 5, 2, 6)
    found = rotary(x, jnp.arange(5))
    for t, i in np.ndindex(5, 3):
        angle = t * 10000 ** (-2 * i / 6)
        turned = (exact(x)[0, t, :, i] + 1j * exact(x)[0, t, :, i + 3]) * np.exp(1j * angle)
        np.testing.assert_allclose(found[0, t, :, i], turned.real, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[0, t, :, i + 3], turned.imag, rtol=1e-4, atol=1e-5)
    product = lambda t: (rotary(x[:, :1], jnp.array([t])) * rotary(x[:, 1:2], jnp.array([t + 2]))).sum()
    np.testing.assert_allclose(product(0), product(7), rtol=1e-4)
    with pytest.raises(ValueError, match="must have heads of an even size"):
        rotary(normal(1, 2, 1, 3), jnp.arange(2))
    with pytest.raises(ValueError, match=r"^`base` \(=0.0\) must be positive; 10000 is usual$"):
        rotary(x, jnp.arange(5), base=0.0)


@pytest.mark.parametrize("center", [True, False])
def test_normalization_of_tokens(center):
    x = 3 + normal(2, 3, 8)
    variables = random_variables_of(Normalized(center), x)
    y = exact(x) - center * exact(x).mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * exact(variables["params"]["scale"])
    y = y + exact(variables["params"]["bias"]) if center else y
    np.testing.assert_allclose(Normalized(center).apply(variables, x), y, rtol=1e-4, atol=1e-5)
    assert Normalized(center).apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def random_variables_of(module, x):
    shapes = jax.eval_shape(module.init, KEY, x)
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), shapes)


@pytest.mark.full
def test_a_causal_attention_with_a_cache_is_the_one_over_all_tokens():
    """Token by token, in parts, and at once; what has no place in the cache is NaN."""
    attention, x = SelfAttention(heads=2, causal=True, rotary_base=100.0, context=6, center_norm=False), normal(2, 6, 8)
    variables = attention.init(KEY, x)
    assert variables.keys() == {"params"}
    whole = attention.apply(variables, x)
    np.testing.assert_array_equal(attention.apply(variables, x.at[:, 4:].set(0.0))[:, :4], whole[:, :4])
    step = jax.jit(lambda v, x: attention.apply(v, x, decode=True, mutable=["cache"]))
    for parts in ((1,) * 6, (2, 1, 3)):
        state, found, first = variables, [], 0
        for size in parts:
            y, updated = step(state, x[:, first : first + size])
            state, first = variables | updated, first + size
            found.append(y)
        np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert jnp.isnan(step(state, x[:, :1])[0]).all()


def test_initializing_to_decode_keeps_no_tokens():
    attention, x = SelfAttention(heads=2, causal=True, context=6), normal(2, 6, 8)
    variables = attention.init(KEY, x, decode=True)
    assert variables["cache"]["position"] == 0
    found, _ = attention.apply(variables, x, decode=True, mutable=["cache"])
    np.testing.assert_allclose(found, attention.apply({"params": variables["params"]}, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`context` \(=6\) must be a place at least for each of 7 tokens in layer"):
        attention.apply(variables, normal(2, 7, 8), decode=True, mutable=["cache"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 0}, r"`heads` \(=0\) must be a positive whole number in layer 'attention'"),
        ({"heads": 2, "context": 0}, r"`context` \(=0\) must be a positive whole number in layer 'attention'"),
        ({"heads": 3}, r"`heads` \(=3\) must divide the 8 features of x, where no `head_size` is given, in layer"),
        ({"heads": 2, "head_size": -1}, r"`head_size` \(=-1\) must be a positive whole number in layer 'attention'"),
        ({"heads": 2, "rotary_base": 0.0}, r"`rotary_base` \(=0.0\) must be positive in layer 'attention'; None does"),
        ({"heads": 2, "causal": True, "binary_scores": True}, r"`binary_scores` \(=True\) cannot be with `causal`"),
        ({"heads": 2, "binary_scores": True, "grid": (2, 2)}, r"`grid` \(=\(2, 2\)\) must be .* with 6 places"),
    ],
)
def test_impossible_attentions_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        SelfAttention(**options, name="attention").init(KEY, normal(1, 6, 8))


@pytest.mark.full
def test_a_frozen_attention_with_one_bit_inputs_is_nan_behind_its_context():
    quantizers = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}
    attention, x = SelfAttention(heads=2, causal=True, context=3, **quantizers), normal(1, 2, 8)
    variables = jax.jit(attention.init)(KEY, x)
    frozen = variables | attention.apply(variables, x, mutable=["packed"])[1]
    y, cache = attention.apply(frozen, x, decode=True, mutable=["cache"])
    assert jnp.isfinite(y).all()
    assert jnp.isnan(attention.apply(frozen | cache, x, decode=True, mutable=["cache"])[0]).all()


def test_decoding_needs_a_mutable_cache():
    attention, x = SelfAttention(heads=2, causal=True), normal(1, 2, 8)
    variables = attention.init(KEY, x)
    text = r"^`decode` \(=True\) needs its collection mutable in layer 'SelfAttention'; call `apply` with mutable="
    with pytest.raises(ValueError, match=text):
        attention.apply(variables, x, decode=True)


def test_what_is_not_causal_is_not_decoded():
    with pytest.raises(ValueError, match=r"`causal` \(=False\) must be True to decode, for the tokens that follow"):
        SelfAttention(heads=2, context=64).init(KEY, normal(1, 6, 8), decode=True)
