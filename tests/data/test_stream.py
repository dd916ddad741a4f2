"""Sets read from disk: the same batches however they are read, every example once, what is corrupt, how it ends."""

import contextlib
import io
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image
from small_sets import write_mnist

from bnn_jax.data import batches, batching, load_dataset, open_stream, padded_order, prefetch, stream, tfds_records
from bnn_jax.data.decoding import decode_image
from bnn_jax.data.synthetic import _share, write_synthetic_imagenet
from bnn_jax.errors import RunError, UsageError

READ = {"seed": 5, "epoch": 2, "training": True}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder)
    return {"data_dir": folder, "cache_dir": folder / "cache"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with 60 + 20 small photographs of many sizes, one of each split corrupt."""
    folder = tmp_path_factory.mktemp("photographs")
    options = {"train_examples": 60, "validation_examples": 20, "classes": 7, "grey": 0.1, "cmyk": 0.1}
    write_synthetic_imagenet(folder, short_side=(16, 40), **options)
    return folder


def open_photographs(folder, preprocessing="random_resized_crop", **options):
    given = {"validation_examples": 10, "image_size": 8} | options
    return open_stream("imagenet2012", data_dir=folder, preprocessing=preprocessing, **given)


def read(split, order, **options):
    with batches(split, order, **(READ | options)) as found:
        return list(found)


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


def numbers_of(images):
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]


# -- the same as load_dataset


def test_the_splits_are_those_of_load_dataset_in_their_order(mnist):
    for options in ({}, {"validation_examples": 20, "split_seed": 3}):
        whole = load_dataset("mnist", **mnist, **options)
        opened = open_stream("mnist", **mnist, **options)
        for name in ("name", "num_classes", "mean", "std", "note"):
            assert getattr(opened, name) == getattr(whole, name), name
        assert opened.image_shape == (28, 28, 1)
        for name in ("train", "validation", "test"):
            split, expected = getattr(opened, name), getattr(whole, name)
            (found,) = read(split, np.arange(len(split))[None])
            assert found[0].dtype == np.uint8 and found[1].dtype == np.int32
            assert same([found], [(expected.images, expected.labels)])


def test_statistics_are_computed_once(mnist, monkeypatch, caplog):
    first = open_stream("mnist", **mnist, split_seed=9)
    monkeypatch.setattr(stream, "read_batch", lambda *_, **__: pytest.fail("read again"))
    assert open_stream("mnist", **mnist, split_seed=9).std == first.std
    monkeypatch.undo()
    for path in mnist["cache_dir"].glob("*.json"):
        path.write_text("{")
    assert open_stream("mnist", **mnist, split_seed=9).std == first.std
    assert "is damaged" in caplog.text
    with caplog.at_level(logging.WARNING):
        (mnist["data_dir"] / "file").write_text("")
        assert open_stream("mnist", **mnist | {"cache_dir": mnist["data_dir"] / "file"}).num_classes == 10
    assert "cannot be written" in caplog.text


# -- which examples, and when


@pytest.mark.parametrize("processes", range(1, 9))
@pytest.mark.parametrize(("taken", "batch"), [(34, 10), (2, 7)])
def test_every_example_comes_exactly_once_an_epoch(mnist, processes, taken, batch):
    split = open_stream("mnist", **mnist, validation_examples=taken).train
    expected = numbers_of(load_dataset("mnist", **mnist, validation_examples=taken).train.images)
    assert len(set(expected)) == len(split) == 95 - taken
    order = padded_order(np.random.default_rng(0).permutation(len(split)), batch, processes)
    assert order.shape[1] >= batch and order.shape[1] % processes == 0
    blocks = [read(split, order, process_index=i, process_count=processes) for i in range(processes)]
    joined = [tuple(map(np.concatenate, zip(*parts))) for parts in zip(*blocks)]
    assert same(joined, read(split, order))
    images, labels = map(np.concatenate, zip(*joined))
    filled = labels >= 0
    assert sorted(numbers_of(images[filled])) == sorted(expected)
    assert not images[~filled].any()


@pytest.mark.full
def test_a_run_resumed_at_any_of_50_positions_goes_on_alike(photographs):
    split = open_photographs(photographs).train
    order = np.random.default_rng(1).permutation(np.tile(np.arange(50), 3)).reshape(50, 3)
    whole = read(split, order)
    for first_step in range(51):
        assert same(read(split, order, first_step=first_step), whole[first_step:])


@pytest.mark.full
def test_workers_change_nothing_and_are_gone_when_closed_or_killed(photographs):
    split = open_photographs(photographs).train
    skipped = {workers: [] for workers in (0, 1, 2)}
    order = padded_order(np.random.default_rng(2).permutation(50), 4)
    read(split, order, on_skipped=lambda *which: skipped[0].append(which))
    # The corrupt example comes in the fifth row.
    order.flat[[16, np.flatnonzero(order == skipped[0][0][0])[0]]] = skipped[0][0][0], order.flat[16]
    order = np.tile(order, (4, 1))
    expected = read(split, order)
    for workers, first_step in ((1, 0), (2, 3)):
        record = partial(lambda workers, *which: skipped[workers].append(which), workers)
        found = batches(split, order, **READ, workers=workers, first_step=first_step, on_skipped=record)
        ahead = prefetch(found, lambda batch: batch)
        assert same([next(ahead) for _ in range(6)], expected[first_step : first_step + 6])
        children = multiprocessing.active_children()
        assert len(children) == workers and skipped[workers] == skipped[0]
        if workers == 1:
            ahead.close()
        else:
            children[0].kill()
            with pytest.raises(RunError, match=r"reads images ended with code -9, .* use fewer `workers`, or 0"):
                list(ahead)
        assert not multiprocessing.active_children() and not list(ahead) and not list(found)


def test_little_shared_memory_is_not_used(monkeypatch, tmp_path):
    assert batching._least_shared(1) < 2**30 < batching._least_shared(2**60)
    monkeypatch.setattr(batching, "SHARED_MEMORY", tmp_path / "none")
    assert batching._least_shared(1) > 2**30


def test_crops_depend_on_seed_epoch_and_example_alone(photographs):
    split = open_photographs(photographs).train
    row = np.arange(12)[None]
    ((images, _),) = read(split, row)
    ((reversed_images, _),) = read(split, row[:, ::-1])
    np.testing.assert_array_equal(reversed_images[::-1], images)
    for other in ({"seed": 6}, {"epoch": 3}):
        ((changed, _),) = read(split, row, **other)
        assert (changed != images).any(axis=(1, 2, 3)).all()
    ((first, _),) = read(split, row, training=False)
    assert same(read(split, row, training=False, seed=1, epoch=1), read(split, row, training=False))
    assert (first != images).any(axis=(1, 2, 3)).all()


def test_padded_order_refuses_what_makes_no_rows():
    for arguments, name in (((0, 1), "count"), ((5, 0), "batch"), ((5, 1, 0), "multiple")):
        with pytest.raises(ValueError, match=rf"`{name}` \(=0\) must be at least 1"):
            padded_order(*arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        ([[0, 85]], {}, r"`order` has indices 0 to 85; the split has 0 to 84, -1 is none"),
        ([[-2, 1]], {}, r"`order` has indices -2 to 1"),
        ([0, 1], {}, r"`order` has shape \(2,\) and type int64; it must be whole numbers \[steps, batch\]"),
        ([[0.5]], {}, r"`order` has shape \(1, 1\) and type float64"),
        (
            [[0, 1, 2]],
            {"process_count": 2},
            r"`process_count` \(=2\) must divide the 3 columns of `order`; make it with",
        ),
        ([[0, 1]], {"process_count": 2, "process_index": 2}, r"`process_index` \(=2\) must be 0 to 1"),
        ([[0, 1]], {"first_step": 2}, r"`first_step` \(=2\) must be 0 to 1, the rows of `order`"),
        ([[0, 1]], {"workers": -1}, r"`workers` \(=-1\) must not be negative; 0 reads with threads"),
        ([[0, 1]], {"seed": -1}, r"`seed` \(=-1\) must be in \[0, 2\^64\)"),
    ],
)
def test_an_order_that_cannot_be_read_is_refused(order, options, message, mnist):
    split = open_stream("mnist", **mnist, validation_examples=10).train
    with pytest.raises(ValueError, match=message):
        batches(split, np.array(order), **(READ | options))


# -- what is corrupt


def test_corrupt_examples_are_left_out_in_evaluation_and_replaced_in_training(photographs):
    split = open_photographs(photographs).test
    row, found = np.arange(20)[None], []
    ((images, labels),) = read(split, row, training=False, on_skipped=lambda *which: found.append(which))
    ((index, reason),) = found
    assert "imagenet2012-validation.array_record-00000-of-00001 cannot be decoded: " in reason
    assert f"record {index} of {photographs}" in reason
    assert np.flatnonzero(labels < 0).tolist() == [index] and not images[index].any()
    ((images, labels),) = read(split, row, on_skipped=lambda *which: found.append(which))
    following = (index + 1) % 20
    assert found[1] == found[0]
    # The next one takes its place, with its own label and its own random crop.
    assert labels[index] == labels[following] and (images[index] == images[following]).all()
    with pytest.raises(RunError, match=rf"example {index} of the test split is corrupt: record {index} of .*`strict`"):
        read(split, row, strict=True)
    with pytest.raises(
        RunError, match=r"no example from 0 to 2 of the test split can be used, the last because record"
    ):
        read(replace(split, positions=np.repeat(index, 3)), np.array([[0]]))


def test_a_flipped_bit_in_a_record_is_a_corrupt_example(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "sets")
    shard = next((tmp_path / "sets").rglob("*validation.array_record*"))
    data = bytearray(shard.read_bytes())
    encoded, _ = open_photographs(photographs).test[5]
    data[data.index(encoded[-200:-100])] ^= 1
    shard.write_bytes(data)
    split, found = open_photographs(tmp_path / "sets").test, []
    ((_, labels),) = read(split, np.arange(20)[None], training=False, on_skipped=lambda *which: found.append(which))
    reasons = dict(found)
    assert len(found) == 2 and set(np.flatnonzero(labels < 0)) == set(reasons)
    assert sum(f"of {shard} cannot be read: " in reason for reason in reasons.values()) == 1


def test_a_file_that_is_cut_short_or_gone_is_refused(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "sets")
    shard = next((tmp_path / "sets").rglob("*train.array_record*"))
    opened = open_photographs(tmp_path / "sets")
    shard.write_bytes(shard.read_bytes()[:-5000])
    tfds_records._open_source.cache_clear()
    with pytest.raises(RunError, match=rf"{shard} cannot be opened \(.*; copy or prepare the set again"):
        read(opened.train, np.array([[0, 1]]))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_images_of_every_mode_become_rgb(mode):
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    image = Image.fromarray(colours).resize((32, 32), Image.Resampling.NEAREST)
    encoded = io.BytesIO()
    image.convert(mode).save(encoded, *(("JPEG",) if mode == "CMYK" else ("PNG",)))
    found = decode_image(encoded.getvalue(), "RGB")
    assert found.mode == "RGB"
    if mode in ("L", "LA"):
        luma = np.array([[76, 150], [29, 255]])  # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
        expected = np.repeat(luma[..., None], 3, axis=-1)
    elif mode != "1":
        expected = colours
    else:
        return
    np.testing.assert_allclose(np.asarray(found)[4::16, 4::16], expected, atol=2 if mode == "CMYK" else 1)


def test_of_16_bits_the_upper_8_are_taken():
    encoded = io.BytesIO()
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    Image.fromarray(values).save(encoded, "PNG")
    for mode in ("L", "RGB"):
        found = np.asarray(decode_image(encoded.getvalue(), mode)).reshape(2, 3, -1)
        np.testing.assert_array_equal(
            found, np.repeat([[[0], [0], [1]], [[128], [254], [255]]], found.shape[-1], axis=-1)
        )


# -- opening


def test_the_set_for_imagenet_has_its_features_and_its_official_validation_split_as_test(photographs):
    opened = open_photographs(photographs, image_size=None)
    assert [len(split) for split in (opened.train, opened.validation, opened.test)] == [50, 10, 20]
    assert (opened.num_classes, opened.image_shape, opened.train.name) == (7, (224, 224, 3), "train")
    assert opened.mean == pytest.approx((123.675, 116.28, 103.53)) and opened.std == pytest.approx(
        (58.395, 57.12, 57.375)
    )
    assert (
        opened.note == "imagenet2012 (JPEG; TFDS 5.1.0; random_resized_crop to 224x224); tested on the validation split"
    )
    taken = np.concatenate([opened.train.positions, opened.validation.positions])
    assert sorted(taken) == list(range(60)) and opened.test.source.split == "validation"
    images = []
    for i in range(50):
        with contextlib.suppress(OSError):  # the corrupt one
            images.append(Image.open(io.BytesIO(opened.train[i][0])))
    assert len(images) >= 49
    assert {image.mode for image in images} == {"RGB", "L", "CMYK"} and {image.format for image in images} == {"JPEG"}
    assert len({image.size for image in images}) > 20
    assert min(min(image.size) for image in images) >= 16 and max(min(image.size) for image in images) <= 40


def test_made_up_photographs_are_the_same_again(photographs, tmp_path):
    options = {"train_examples": 60, "validation_examples": 20, "classes": 7, "grey": 0.1, "cmyk": 0.1}
    write_synthetic_imagenet(tmp_path, short_side=(16, 40), **options)
    one, other = open_photographs(photographs), open_photographs(tmp_path)
    assert all(one.test[i] == other.test[i] for i in range(20))
    with pytest.raises(UsageError, match=r"imagenet2012/5.1.0 exists already; delete it"):
        write_synthetic_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mine/v2"}, r"`name` \(='mine/v2'\) must be made of letters, digits, _, - and \."),
        ({"name": ".."}, r"`name` \(='\.\.'\) must be made of letters"),
        (
            {"corrupt": 20},
            r"`corrupt` \(=20\) must leave ordinary images: with grey and CMYK ones it makes 22 of the 20",
        ),
        ({"short_side": (40, 16)}, r"`short_side` \(=\(40, 16\)\) must be two lengths, the lesser one first"),
        ({"grey": 1.5}, r"`grey` \(=1.5\) must be a share, 0 to 1"),
        ({"grey": float("nan")}, r"`grey` \(=nan\) must be a share, 0 to 1"),
        ({"aspect": (1, float("inf"))}, r"`aspect` \(=\(1, inf\)\) must be two positive ratios"),
        ({"classes": 0}, r"`classes` \(=0\) must be at least 1"),
    ],
)
def test_photographs_that_cannot_be_made_are_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        write_synthetic_imagenet(tmp_path, **({"validation_examples": 20} | options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {}, r"`name` \(='digits'\) is loaded whole: turn streaming off"),
        ("a.npz", {}, r"`name` \(='a.npz'\) is loaded whole"),
        ("text", {}, r"`name` \(='text'\) is loaded whole"),
        ("a.txt", {}, r"`name` \(='a.txt'\) is loaded whole"),
        (
            "imagenet2012",
            {"preprocessing": "resize"},
            r"`preprocessing` \(='resize'\) is not known; did you mean 'resize_c",
        ),
        ("imagenet2012", {"image_size": 8}, r"`image_size` \(=8\) needs a `preprocessing`: resize_crop"),
        ("imagenet2012", {"validation_examples": 60}, r"`validation_examples` \(=60\) must be 1 to 53"),
        ("imagenet", {}, r"`name` \(='imagenet'\) is not 'digits', .* did you mean 'imagenet2012'"),
    ],
)
def test_what_cannot_be_streamed_is_refused(name, options, message, photographs):
    with pytest.raises(UsageError, match=message):
        open_stream(name, data_dir=photographs, **options)


def test_images_of_differing_sizes_need_a_preprocessing(photographs, tmp_path):
    with pytest.raises(
        UsageError, match=r"images of .*5.1.0 differ in size: .* choose a `data.preprocessing`: resize_crop, "
    ):
        open_stream("imagenet2012", data_dir=photographs, cache_dir=tmp_path)


def test_a_missing_imagenet_comes_with_its_commands(tmp_path):
    with pytest.raises(
        UsageError, match=r"tfds build imagenet2012 --file_format array_record; or .*bnn-jax synthesize"
    ):
        open_stream("imagenet2012", data_dir=tmp_path)


# -- prefetch, and how it all ends


def test_prefetch_runs_ahead_by_its_depth_and_counts_the_seconds_waited():
    made = []
    with prefetch(range(10), made.append, depth=3) as items:
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2] and items.waited == 0
        assert len(list(items)) == 10
    with prefetch(range(3), lambda _: time.sleep(0.05)) as slow:
        list(slow)
    assert 0.1 < slow.waited < 1


def test_prefetch_passes_on_what_goes_wrong():
    def fail(number):
        if number == 2:
            raise RunError("this one")
        return number

    with prefetch(range(5), fail) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(RunError, match="this one"):
            next(items)
        assert list(items) == []
    with pytest.raises(ValueError, match=r"`depth` \(=0\) must be at least 1"):
        prefetch([], fail, depth=0)


def test_errors_of_readers_are_those_of_the_split(mnist):
    opened = open_stream("mnist", **mnist)
    found = batches(replace(opened.train, num_classes=3), padded_order(85, 10), **READ)
    with pytest.raises(RunError, match=r"record \d+ of .*mnist-train.* has the label [3-9]; labels are 0 to 2"):
        list(found)
    assert list(found) == []


PROGRAM = """
import signal, sys, time
import numpy as np
from bnn_jax.data import batches, open_stream

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    opened = open_stream("imagenet2012", data_dir=sys.argv[1], preprocessing="random_resized_crop", image_size=8)
    order = np.tile(np.arange(50), (10000, 1))
    found = batches(opened.train, order, seed=0, epoch=0, training=True, workers=1)
    while True:
        try:
            for _ in found:
                print("taken", flush=True)
                time.sleep(0.1)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
"""


def is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.full
def test_workers_leave_signals_to_their_program_and_end_when_it_is_killed(photographs, subprocess_env, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, program, photographs]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=subprocess_env, **pipes) as process:
        try:
            assert process.stdout.readline() == "taken\n"
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            lines = [process.stdout.readline() for _ in range(30)]
            assert "interrupted\n" in lines and lines[-10:] == ["taken\n"] * 10
        finally:
            process.kill()
        err = process.communicate(timeout=30)[1]
    deadline = time.monotonic() + 10
    while is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process.pid)
    assert "Traceback" not in err


@pytest.mark.parametrize(("share", "count", "images"), [(0.07, 100, 7), (0.14, 50, 7), (0.001, 100, 1), (0.0, 10, 0)])
def test_a_share_is_rounded_up_but_for_what_floats_add(share, count, images):
    assert _share(share, count) == images
