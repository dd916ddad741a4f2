"""BitNet's language model: its formula in float64, one token after another as all at once, sampled on packed bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import apply, exact, random_variables

from bnn_jax.cli.summarize import main as summarize_main
from bnn_jax.models import sample
from bnn_jax.models.build import build_model
from bnn_jax.packed import freeze, verify

TOKENS, WORDS = 6, 11


@pytest.fixture(scope="module")
def network():
    model = build_model("bitnet_lm", num_classes=WORDS, width=8, options={"depth": 1, "heads": 2})
    return model, random_variables(model, (TOKENS, 1, 1))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (3, TOKENS)), jnp.int32)


def root_mean_square(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def bit_linear(x, w):
    """8 bits a token by the largest magnitude, three values by the mean magnitude, as the paper says."""
    largest = np.abs(x).max(-1, keepdims=True)
    codes, mean = np.rint(x * 127 / largest), np.abs(w).mean() + 1e-5
    return codes @ np.clip(np.rint(w / mean), -1, 1) * (largest / 127) * mean


def turned(x):
    """Rotary positions of (tokens, size) as complex numbers."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-2 * np.arange(half) / x.shape[1])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], 1)


def twin(params, text):
    """The logits of one text."""
    weights = lambda module, name: next(iter(params[module][name].values()))
    x = params["embedding"][text]
    normed = root_mean_square(x, params["attention_norm1"]["scale"])
    q, k, v = (bit_linear(normed, weights("attention1", n)["latent_kernel"]) for n in ("query", "key", "value"))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = turned(q[:, head]) @ turned(k[:, head]).T / 2
        scores[np.triu_indices(len(text), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(shares / shares.sum(-1, keepdims=True) @ v[:, head])
    y = root_mean_square(np.concatenate(heads, 1), params["attention1"]["out_norm"]["scale"])
    x = x + bit_linear(y, weights("attention1", "out")["latent_kernel"])
    normed = root_mean_square(x, params["mlp_norm1"]["scale"])
    gate, up = (bit_linear(normed, params["mlp1"][name]["latent_kernel"]) for name in ("gate", "up"))
    hidden = root_mean_square(gate / (1 + np.exp(-gate)) * up, params["mlp1"]["norm"]["scale"])
    x = x + bit_linear(hidden, params["mlp1"]["down"]["latent_kernel"])
    return root_mean_square(x, params["head_norm"]["scale"]) @ params["head"]["kernel"] + params["head"]["bias"]


def test_logits_are_the_papers(network, tokens):
    """But where float32 and float64 round a code apart, which moves a logit by some thousandths."""
    model, variables = network
    logits, intermediates = apply(model, variables, tokens)
    params = exact(variables["params"])
    expected = np.stack([twin(params, text) for text in np.asarray(tokens)])
    np.testing.assert_allclose(logits, expected, rtol=0.02, atol=0.02)
    assert np.median(np.abs(logits - expected)) < 1e-4
    assert intermediates["features"].shape == (3, TOKENS, 8)


def test_tokens_come_as_images_too_and_none_sees_those_behind_it(network, tokens):
    model, variables = network
    run = jax.jit(lambda tokens: model.apply(variables, tokens, train=False)[0])
    logits = run(tokens)
    np.testing.assert_array_equal(run(tokens.astype(jnp.float32)[..., None, None]), logits)
    np.testing.assert_array_equal(run(tokens.at[:, 4:].set(0))[:, :4], logits[:, :4])
    unknown = run(tokens.at[0, 2].set(WORDS))
    assert jnp.isnan(unknown[0, 2:]).all() and jnp.isfinite(unknown[1:]).all()
    for value in (1.7, -0.5, np.nan, np.inf):
        unknown = run(tokens.astype(jnp.float32).at[0, 2].set(value))
        assert jnp.isnan(unknown[0, 2:]).all() and jnp.isfinite(unknown[1:]).all(), value
    with pytest.raises(ValueError, match=r"`images.shape` \(=\(1, 6, 2, 1\)\) must be \(batch, tokens\), or"):
        run(jnp.zeros((1, 6, 2, 1)))


def test_token_by_token_with_a_cache_is_the_whole_text(network, tokens):
    model, variables = network
    whole = apply(model, variables, tokens)[0]
    step = jax.jit(lambda v, x: model.apply(v, x, train=False, decode=True, mutable=["cache"]))
    state, found = variables, []
    for token in tokens.T:
        (logits, _), updated = step(state, token[:, None])
        state = variables | updated
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_a_packed_network_is_sampled_as_the_trained_one(network, tokens):
    """Greedily: what the whole text so far says is most likely, token by token."""
    model, variables = network
    packed = freeze(model, variables, (TOKENS, 1, 1))
    report = verify(model, variables, packed, [tokens.astype(jnp.float32)[..., None, None]])
    assert report.passed and report.largest_logit_difference == 0 and report.layers["mlp1/up"].integers == 3 * 6 * 32
    found = sample(model, variables, tokens, 4, temperature=0)
    np.testing.assert_array_equal(sample(model, packed, tokens, 4, temperature=0), found)
    text = np.asarray(tokens)
    for _ in range(4):
        following = model.apply(variables, jnp.asarray(text), train=False)[0][:, -1].argmax(-1)
        text = np.concatenate([text, np.asarray(following)[:, None]], 1)
    np.testing.assert_array_equal(found, text[:, TOKENS:])


@pytest.mark.full
def test_samples_are_drawn_by_their_probabilities(network, tokens):
    model, variables = network
    prompt = jnp.tile(tokens[:1], (4000, 1))
    drawn = sample(model, variables, prompt, 1, temperature=2.0, key=jax.random.key(1))
    logits = model.apply(variables, tokens[:1], train=False)[0][0, -1]
    shares = np.bincount(np.asarray(drawn)[:, 0], minlength=WORDS) / 4000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits / 2), atol=0.03)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, r"`count` \(=0\) must be at least 1"),
        ({"temperature": -1.0}, r"`temperature` \(=-1.0\) must not be negative; 0 takes the most likely token"),
        ({}, r"`key` \(=None\) is needed to draw tokens; give jax.random.key\(0\), or `temperature` 0"),
        ({"prompt": jnp.array([[1, WORDS]])}, r"`prompt` \(=.*11.*\) must hold tokens from 0 to 10"),
        ({"prompt": jnp.array([[1, 1.5]])}, r"`prompt` \(=.*1.5.*\) must hold tokens from 0 to 10"),
        ({"prompt": jnp.zeros((1, 0))}, r"`prompt.shape` \(=\(1, 0\)\) must have a token at least"),
    ],
)
def test_impossible_samples_are_refused(network, tokens, options, text):
    with pytest.raises(ValueError, match=text):
        sample(*network, **{"prompt": tokens, "count": 2} | options)


@pytest.mark.full
def test_prompts_of_any_dtype_are_continued(network, tokens):
    found = sample(*network, tokens, 3, temperature=0)
    for dtype in (jnp.float32, jnp.uint8):
        np.testing.assert_array_equal(sample(*network, tokens.astype(dtype), 3, temperature=0), found)
    of_half = sample(*network, tokens.astype(jnp.bfloat16), 3, temperature=0)
    assert of_half.shape == (3, 3) and of_half.dtype == jnp.int32 and ((of_half >= 0) & (of_half < WORDS)).all()


def test_a_dtype_that_rounds_tokens_is_refused():
    model = build_model("bitnet_lm", num_classes=258, width=8, options={"depth": 1, "heads": 2})
    with pytest.raises(ValueError, match=r"`images.dtype` \(='bfloat16'\) does not hold all of 258 tokens; give whole"):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.ones((1, 2), jnp.bfloat16))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"`heads` \(=3\) of BitNetLM must divide `width` \(=8\) into even numbers"):
        build_model("bitnet_lm", num_classes=2, width=8, options={"heads": 3})


@pytest.mark.full
def test_a_network_of_texts_is_summarized_by_its_tokens(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["summarize", "bitnet_lm", "--tokens", "8", "--options", "depth", "1"])
    summarize_main()
    printed = capsys.readouterr().out
    assert "one image of 8x1x1" in printed and "53,248 2-bit weights" in printed and "256 biases" in printed
