"""Names of what a user brings."""

import logging
import os
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax import ACTIVATION_QUANTIZERS, LOSSES, WEIGHT_QUANTIZERS, BinaryConv, BinaryDense, make_quantizer
from bnn_jax.checks import look_up
from bnn_jax.errors import UsageError
from bnn_jax.estimators import ESTIMATORS, approx_sign, make_sign
from bnn_jax.names import (
    IN_MEMORY,
    absolute,
    contents_of,
    import_named,
    last_part,
    module_of_file,
    name_of,
    record_of,
)

MINE = """
import dataclasses

@dataclasses.dataclass
class Net:
    width: "int" = 3

    class Part:
        pass

def loss(logits, labels):
    return logits.sum(1)

def get_config():
    return Net(width=5)

nameless = (lambda: (lambda x: x))()
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine_in_a_file.py"
    path.write_text(MINE)
    return path


def test_a_module_and_a_file_are_imported_once(mine, monkeypatch):
    assert import_named("loss", "bnn_jax.losses:LOSSES") is LOSSES
    net = import_named("name", f"{mine}:Net")
    assert net is import_named("name", f"{mine}:Net") and import_named("name", f"{mine}:Net.Part") is net.Part
    assert import_named("name", f"{mine}:get_config().width") == 5
    monkeypatch.chdir(mine.parent)
    assert import_named("name", f"{mine.name}:Net") is net
    assert (
        absolute(f"{mine.name}:Net") == f"{mine}:Net" and absolute("a.b:C") == "a.b:C" and absolute("lenet") == "lenet"
    )


def test_a_file_that_changed_is_run_again(mine):
    assert module_of_file(mine) is module_of_file(mine)
    mine.write_text(MINE + "\nlater = 1\n")
    assert module_of_file(mine).later == 1


def test_a_thing_has_the_name_that_finds_it(mine):
    module = module_of_file(mine)
    for thing, name in (
        (module.Net, f"{mine}:Net"),
        (module.Net.Part, f"{mine}:Net.Part"),
        (module.nameless, f"{mine}:nameless"),
        (approx_sign, "bnn_jax:approx_sign"),
    ):
        assert name_of(thing) == name and import_named("it", name) is thing
    assert name_of(module.Net()) is None and name_of(lambda x: x) is None and name_of(3) is None


def test_a_module_that_is_a_file_in_some_folder_is_named_by_it(mine, monkeypatch):
    monkeypatch.syspath_prepend(mine.parent)
    import mine_in_a_file

    assert name_of(mine_in_a_file.Net) == f"{mine}:Net"
    assert import_named("name", f"{mine}:Net") is mine_in_a_file.Net


def test_what_has_no_name_says_so_where_one_is_needed():
    record = record_of(lambda x: x)
    assert record.startswith(IN_MEMORY) and " at 0x" not in record
    with pytest.raises(UsageError, match=r"`loss` \(=<function .*lambda.*\) was given as an object .* give its name"):
        import_named("loss", record)


SLOPE = 2.0


def bump(slope):
    return make_sign(lambda x: slope * jnp.exp(-x * x))


def of_a_class(slope):
    class Line:
        def __init__(self, start=0):
            self.start = start

        def __call__(self, x):
            return self.start + slope * x

    return Line


def of_a_network(slope):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return slope * nn.Dense(3)(x)

    return Scaled


@pytest.mark.parametrize(
    "make",
    [
        lambda slope: lambda x: slope * x,
        lambda slope: lambda x, slope=slope: slope * x,
        bump,
        lambda slope: jax.jit(lambda x: slope * x),
        lambda slope: optax.sgd(slope),
        lambda slope: optax.chain(optax.clip(1.0), optax.adamw(optax.cosine_decay_schedule(slope, 10))),
        lambda slope: partial(bump, slope),
        lambda slope: partial(bump, slope=np.array([slope, 1.0])),
        lambda slope: partial(bump, {"slopes": {slope, 3.0}}),
        lambda slope: of_a_class(slope),
        lambda slope: of_a_class(3.0)(slope),
        lambda slope: of_a_class(slope)().__call__,
        lambda slope: nn.Dense(3, kernel_init=nn.initializers.normal(slope)),
        lambda slope: partial(bump, jax.random.key(int(slope))),
        lambda slope: nn.jit(of_a_network(slope)),
    ],
)
def test_things_without_a_name_are_told_apart_by_what_is_in_them(make):
    """Two made of the same are one thing, also after they were called; of another slope they are another."""
    first, again, other = make(1.0), make(1.0), make(2.0)
    assert record_of(first) == record_of(again) != record_of(other)
    if not isinstance(first, type | nn.Module | optax.GradientTransformation | partial):
        for _ in range(100):
            first(jnp.ones(3))
    assert record_of(first) == record_of(again)


def test_code_and_globals_are_contents_too(monkeypatch):
    own = lambda x: SLOPE * x
    before = contents_of(own)
    assert before != contents_of(lambda x: SLOPE + x)
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert contents_of(own) != before
    monkeypatch.setitem(globals(), "SLOPE", 2.0)
    assert contents_of(own) == before
    around = lambda x: (lambda y: SLOPE * y)(x)
    before = contents_of(around)
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert contents_of(around) != before


USED = {
    "schedule": (lambda: optax.cosine_decay_schedule(1.0, 100), lambda thing: thing(3)),
    "warm-up": (lambda: optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100), lambda thing: thing(3)),
    "logger": (lambda: lambda: LOGGER, lambda thing: thing().isEnabledFor(logging.INFO)),
    "generator": (lambda: lambda: RANDOM, lambda thing: thing().normal()),
    "network": (lambda: of_a_network(1.0), lambda thing: thing().init(jax.random.key(0), jnp.ones((1, 2)))),
    "jitted network": (
        lambda: nn.jit(of_a_network(1.0)),
        lambda thing: thing().init(jax.random.key(0), jnp.ones((1, 2))),
    ),
}
LOGGER, RANDOM = logging.getLogger(__name__), np.random.default_rng(0)


@pytest.mark.parametrize("kind", USED)
@pytest.mark.usefixtures("standard_dtypes")
def test_use_changes_no_contents(kind):
    """Of schedules, which convert their steps, of loggers and generators, of modules that Flax compiles."""
    make, use = USED[kind]
    thing = make()
    before = contents_of(thing)
    use(thing)
    assert contents_of(thing) == before == contents_of(make())


def test_things_that_hold_themselves_or_odd_numbers_have_contents():
    def power(x, count):
        return x * power(x, count - 1) if count else 1.0

    around, table = set(), {}
    around.add(in_a_set := lambda: around)
    table[power] = table
    deleted = jnp.ones(2)
    deleted.delete()
    for thing in (power, in_a_set, partial(power, table), partial(power, [10**400, np.inf, np.nan, 1j, -0.0, deleted])):
        assert contents_of(thing) == contents_of(thing)
    same = (1, 2)
    assert contents_of(partial(power, same, same)) == contents_of(partial(power, (1, 2), tuple(range(1, 3))))
    assert contents_of(partial(power, 1)) == contents_of(partial(power, 1.0)) != contents_of(partial(power, 1.5))


@pytest.mark.full
def test_contents_are_those_of_other_processes():
    """Whatever the seed of hashes is, on which the order of sets depends."""
    text = (
        "import optax; from bnn_jax.names import contents_of; import bnn_jax\n"
        "print([contents_of(x) for x in (lambda x: x in {'a', 'b', 'c'}, optax.adamw(0.1), {'p', 'q', 'r'}, optax)])"
    )
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", text], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
    )
    first, second = run("1"), run("2")
    assert first.stdout == second.stdout != "", first.stderr


def test_labels_are_short():
    assert [last_part(name) for name in ("adam", "optax:lion", "/a/b.py:Net.Part")] == ["adam", "lion", "Part"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "nowhere.at_all:Net",
            "there is no module 'nowhere'; install it, start in its folder, or",
        ),
        ("bnn_jax.losses:LOSES", "bnn_jax.losses has no 'LOSES'; did you mean 'LOSSES'"),
        ("nowhere/net.py:Net", "there is no file .*nowhere/net.py"),
        (":Net", "must be package.module:Name or file.py:Name"),
        ("bnn_jax:", "must be package.module:Name or file.py:Name"),
    ],
)
def test_a_name_that_cannot_be_imported_gives_one_sentence(name, why):
    with pytest.raises(UsageError, match=rf"`loss` \(='{name}'\) .*{why}") as error:
        look_up("loss", name, LOSSES)
    assert "\n" not in str(error.value)


def test_a_file_that_fails_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("import json\njson.loads('{')\n")
    with pytest.raises(UsageError, match=r"imported: JSONDecodeError: .* \(.*broken.py, line 2\)"):
        import_named("loss", f"{tmp_path / 'broken.py'}:x")


@pytest.mark.full
def test_modules_of_the_current_folder_are_found(mine):
    """As `python -m` finds them, also from a script that lies elsewhere."""
    text = "from bnn_jax.names import import_named; print(import_named('name', 'mine_in_a_file:Net'))"
    script = mine.parent / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(text)
    found = subprocess.run([sys.executable, script], cwd=mine.parent, capture_output=True, text=True)
    assert found.stdout == "<class 'mine_in_a_file.Net'>\n", found.stderr


def test_layers_take_names_as_larq_does():
    for layer in (BinaryConv, BinaryDense):
        made = layer(4, input_quantizer="ste_sign", kernel_quantizer="xnor")
        assert made.input_quantizer.code_set == made.kernel_quantizer.code_set == (-1, 1)
        mine = layer(4, input_quantizer="heaviside", kernel_quantizer="bnn_jax.estimators:approx_sign")
        assert mine.input_quantizer.code_set == (0, 1) and mine.kernel_quantizer.code_set == (-1, 1)


@pytest.mark.parametrize("table", [WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS], ids=["weights", "activations"])
def test_every_estimator_is_a_quantizer_by_its_name(table):
    for name, estimator in ESTIMATORS.items():
        assert make_quantizer(table, name).code_set == estimator.code_set
    x = jnp.array([-2.0, 0.0, 3.0])
    assert make_quantizer(table, "ste_sign").apply(x).codes.tolist() == [-1, 1, 1]
    with pytest.raises(UsageError, match="did you mean 'ste_sign'"):
        make_quantizer(table, "ste_sgin")
