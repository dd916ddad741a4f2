"""Write the official CIFAR and MNIST archives as ArrayRecord folders that `tfds.data_source` reads, without TensorFlow.

The official builders say what a set is (name, version, features, URL, SHA-256), but parse their archives with
TensorFlow.  Here the standard library and NumPy parse, and every image is stored as PNG, hence lossless.
"""

import contextlib
import difflib
import gzip
import hashlib
import http.client
import io
import shutil
import tarfile
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from bnn_jax.errors import RunError, UsageError
from bnn_jax.extras import import_extra
from bnn_jax.files import replacing
from bnn_jax.paths import folder_or_home, local_path


class CifarArchive(NamedTuple):
    """Where a CIFAR archive (binary version) keeps its records: label bytes, then 3x32x32 pixels."""

    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_keys: tuple[str, ...]
    label_names: tuple[str, ...]


CIFAR_ARCHIVES = {
    "cifar10": CifarArchive(
        folder="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        label_keys=("label",),
        label_names=("batches.meta.txt",),
    ),
    "cifar100": CifarArchive(
        folder="cifar-100-binary",
        train_files=("train.bin",),
        test_files=("test.bin",),
        label_keys=("coarse_label", "label"),
        label_names=("coarse_label_names.txt", "fine_label_names.txt"),
    ),
}

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz",),
    "cifar100": ("cifar-100-binary.tar.gz",),
    "mnist": MNIST_FILES,
    "fashion_mnist": MNIST_FILES,
}
"""Name of a set -> the files of its official download, in the order :func:`write_array_record` takes them."""


class Parsed(NamedTuple):
    """One split of an archive: uint8 images [N,H,W,C] and integer labels [N] by feature name."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


def default_data_dir() -> Path:
    """The folder of prepared sets when none is given: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      UsageError: as :func:`bnn_jax.paths.folder_or_home`.
    """
    return folder_or_home("TFDS_DATA_DIR", "tensorflow_datasets")


def import_tfds() -> ModuleType:
    """`tensorflow_datasets`, imported when first needed, with what it needs to read ArrayRecord without TensorFlow.

    Raises:
      UsageError: as :func:`import_extra`.
    """
    with warnings.catch_warnings():
        # Deprecations inside these packages are not the caller's to act on.
        warnings.simplefilter("ignore")
        for needed in ("importlib_resources", "array_record.python.array_record_data_source", "tensorflow_datasets"):
            tfds = import_extra(needed, "reading a set of TFDS", "give the data as an .npz file")
        return tfds


def prepare_dataset(name: str, *, data_dir: str | Path | None = None, report: Callable[[str], None] = print) -> Path:
    """Download the official archives of a set, verify them, and write them as ArrayRecord.

    The archives go to `<data_dir>/downloads/<name>/`; one that is there already is verified and used, so on a
    machine without network they can be put there by hand.

    Args:
      name: a key of :data:`ARCHIVES`.
      data_dir: folder of prepared sets; by default that of :func:`default_data_dir`.
      report: called with one line before each step that takes long.

    Returns:
      The folder of the set, `<data_dir>/<name>/<version>`.

    Raises:
      UsageError: for an unknown `name`, or a `data_dir` that cannot be written.
      RunError: when a download fails, an archive is not the official one, or the set cannot be written.
    """
    data_dir = local_path("data_dir", data_dir or default_data_dir())
    official = _official_builder(name)
    folder = data_dir / name / str(official.VERSION)
    if folder.exists():
        report(f"{name} is already in {folder}")
        return folder
    downloads = data_dir / "downloads" / name
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`data_dir` (={str(data_dir)!r}) cannot be written ({error}); give another folder") from error
    published = {info.filename: (url, info.checksum) for url, info in official.url_infos.items()}
    for filename in ARCHIVES[name]:
        url, sha256 = published[filename]
        fetch(url, downloads / filename, sha256=sha256, report=report)
    report(f"writing {folder}")
    return write_array_record(name, [downloads / filename for filename in ARCHIVES[name]], data_dir=data_dir)


def fetch(url: str, path: Path, *, sha256: str, report: Callable[[str], None] = print) -> None:
    """Download `url` to `path` unless that is there already; either way verify its SHA-256.

    Raises:
      RunError: when the download fails, or the file's SHA-256 is another.
    """
    if path.exists():
        if (found := _sha256(path)) != sha256:
            raise RunError(
                f"{path} is not the official file (SHA-256 {found}, official {sha256}); delete it and run again"
            )
        return
    report(f"downloading {url}")
    try:
        with replacing(path) as draft:
            with urllib.request.urlopen(url, timeout=60) as response, draft.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            if (found := _sha256(draft)) != sha256:
                raise RunError(
                    f"what {url} sent is not the official file (SHA-256 {found}, official {sha256}); "
                    "it was cut short or changed: run again"
                )
    except (OSError, http.client.HTTPException) as error:
        raise RunError(
            f"downloading {url} failed ({error}); "
            f"fetch it on a machine with a network, put it at {path}, and run the same command again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_array_record(name: str, archives: Sequence[str | Path], *, data_dir: str | Path) -> Path:
    """Parse official archives on disk and write the set as ArrayRecord, each image as PNG.

    The folder gets its name when it is complete, so a reader never sees half a set.

    Args:
      name: a key of :data:`ARCHIVES`.
      archives: the paths of that entry's files, in its order.
      data_dir: folder of prepared sets.

    Returns:
      The folder of the set, `<data_dir>/<name>/<version>`.

    Raises:
      UsageError: for an unknown `name`, or a set that is there already.
      RunError: when an archive is damaged or the set cannot be written.
    """
    data_dir, archives = local_path("data_dir", data_dir), [local_path("archives", path) for path in archives]
    folder = data_dir / name / str(_official_builder(name).VERSION)
    if folder.exists():
        raise UsageError(f"{folder} exists already; delete it to write it anew, or give another `data_dir`")
    if name in CIFAR_ARCHIVES:
        splits, class_names = parse_cifar(archives[0], CIFAR_ARCHIVES[name])
    else:
        splits, class_names = parse_mnist(archives), {}
    builder = _builder(name, data_dir, splits)
    _check(splits, class_names, builder.info.features, archives[0] if len(archives) == 1 else archives[0].parent)
    for key, names in class_names.items():
        builder.info.features[key].names = names
    write_examples(builder, folder)
    return folder


def write_examples(builder: Any, folder: Path) -> None:
    """Let a TFDS builder write its examples to `folder`, silently.

    Raises:
      RunError: when it cannot be written.
    """
    # TFDS prints a progress bar for each shard and sizes that it knows of its own downloads only.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            builder.download_and_prepare()
        except (OSError, RuntimeError) as error:
            raise RunError(f"{folder} cannot be written ({error}); free space or give another folder") from error


def _official_builder(name: str) -> Any:
    if name not in ARCHIVES:
        nearest = difflib.get_close_matches(name, ARCHIVES, n=1, cutoff=0)[0]
        raise UsageError(
            f"`name` (={name!r}) must be one of {', '.join(ARCHIVES)}; did you mean {nearest!r}? "
            "(any other set can be loaded from an .npz file)"
        )
    return import_tfds().builder_cls(name)


def _builder(name: str, data_dir: Path, splits: Mapping[str, Parsed]) -> Any:
    """The official builder of `name`, except that its examples are those of `splits`."""
    official = _official_builder(name)

    def split_generators(self, _):
        return {split: self._generate_examples(split) for split in splits}

    def generate_examples(self, split):
        images, labels = splits[split]
        for index, image in enumerate(images):
            example = {key: int(values[index]) for key, values in labels.items()} | {"image": _png(image)}
            if "id" in self.info.features:
                example["id"] = f"{split}_{index:05d}"
            yield index, example

    methods = {"_split_generators": split_generators, "_generate_examples": generate_examples}
    with import_tfds().core.registered.skip_registration():
        builder_class = type(official.__name__, (official,), methods | {"name": name})
    return builder_class(data_dir=data_dir, file_format="array_record")


def _check(splits: Mapping[str, Parsed], class_names: Mapping[str, list[str]], features: Any, path: Path) -> None:
    """Refuse what the features of the set do not allow; TFDS would store some of it as it is."""
    way_out = "; delete the download and run again"
    for split, (images, labels) in splits.items():
        shape = features["image"].shape
        sizes = ", ".join(map(str, shape))
        if len(images) == 0 or images.shape[1:] != shape:
            raise RunError(f"the {split} images of {path} have shape {images.shape}, not [N, {sizes}]{way_out}")
        for key, values in labels.items():
            if values.max() >= features[key].num_classes:
                rule = f"labels are 0 to {features[key].num_classes - 1}"
                raise RunError(f"the {split} labels of {path} have the `{key}` {values.max()}; {rule}{way_out}")
    for key, names in class_names.items():
        if len(names) != features[key].num_classes:
            raise RunError(f"{path} names {len(names)} classes for `{key}`, not {features[key].num_classes}{way_out}")


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(encoded, "PNG")
    return encoded.getvalue()


@contextlib.contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise RunError(f"{path} cannot be read as the official archive ({error}); delete it and run again") from error


def parse_cifar(path: Path, layout: CifarArchive) -> tuple[dict[str, Parsed], dict[str, list[str]]]:
    """Read a CIFAR archive (binary version, .tar.gz).

    A record is one byte for each label, then 3072 bytes of pixels: channel by channel, row by row.

    Returns:
      The splits, images uint8 [N,32,32,3], and the class names by feature.

    Raises:
      RunError: when the archive is damaged or one of its files does not hold whole records.
    """
    label_count = len(layout.label_keys)
    splits = {}
    with _archive_errors(path), tarfile.open(path) as archive:
        for split, names in {"train": layout.train_files, "test": layout.test_files}.items():
            members = [f"{layout.folder}/{name}" for name in names]
            records = np.concatenate([_records(path, archive, m, label_count + 3 * 32 * 32) for m in members])
            images = records[:, label_count:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = {key: records[:, i] for i, key in enumerate(layout.label_keys)}
            splits[split] = Parsed(np.ascontiguousarray(images), labels)
        texts = [archive.extractfile(f"{layout.folder}/{name}").read().decode() for name in layout.label_names]
    class_names = {key: [line for line in text.split("\n") if line] for key, text in zip(layout.label_keys, texts)}
    return splits, class_names


def _records(path: Path, archive: tarfile.TarFile, member: str, size: int) -> np.ndarray:
    data = np.frombuffer(archive.extractfile(member).read(), np.uint8)
    if len(data) == 0 or len(data) % size:
        raise RunError(f"{member} in {path} has {len(data)} bytes, not a multiple of {size}; delete it and run again")
    return data.reshape(-1, size)


def parse_mnist(paths: Sequence[Path]) -> dict[str, Parsed]:
    """Read the four idx.gz files of an MNIST-like set, in the order of :data:`MNIST_FILES`.

    Raises:
      RunError: when a file is damaged, or images and labels differ in number.
    """
    train_images, train_labels, test_images, test_labels = (parse_idx(path) for path in paths)
    parsed = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
    for split, (images, labels) in parsed.items():
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise RunError(
                f"the {split} files of {paths[0].parent} hold images of shape {images.shape} and labels of shape "
                f"{labels.shape}, not [N,H,W] and [N]; delete them and run again"
            )
    return {split: Parsed(images[..., None], {"label": labels}) for split, (images, labels) in parsed.items()}


def parse_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Format: bytes 0, 0, 8 (unsigned byte), rank; `rank` big-endian uint32 sizes; then the values.

    Raises:
      RunError: when the file is damaged, or its header and its length do not agree.
    """
    with _archive_errors(path), gzip.open(path) as file:
        data = file.read()
    rank = data[3] if len(data) > 3 else 0
    header = 4 + 4 * rank
    if data[:3] != b"\0\0\x08" or len(data) < header:
        raise RunError(f"{path} begins with {data[:4].hex()}, not an idx header; delete it and run again")
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], ">u4"))
    if len(data) - header != int(np.prod(shape, dtype=np.int64)):
        raise RunError(f"{path} says shape {shape} but holds {len(data) - header} values; delete it and run again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
