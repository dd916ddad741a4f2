"""What happens to the bytes of a file: (rng, bytes) -> bytes."""

import numpy as np


def some_bytes(rng: np.random.Generator, data: bytes) -> tuple[int, int]:
    """A place, and a length that is often short."""
    return int(rng.integers(len(data))), int(2 ** rng.uniform(0, 8))


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    bits[rng.integers(0, bits.size, rng.integers(1, 9))] ^= 1
    return np.packbits(bits).tobytes()


def flip_one_bit(rng, data):
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


def overwrite(rng, data):
    start, size = some_bytes(rng, data)
    return data[:start] + rng.bytes(size) + data[start + size :]


def zero(rng, data):
    start, size = some_bytes(rng, data)
    return data[:start] + bytes(size) + data[start + size :]


def truncate(rng, data):
    return data[: int(rng.integers(len(data)))]


def insert(rng, data):
    start, size = some_bytes(rng, data)
    return data[:start] + rng.bytes(size) + data[start:]


def delete(rng, data):
    start, size = some_bytes(rng, data)
    return data[:start] + data[start + size :]


def exchange(rng, data):
    """Two neighbouring blocks in the other order."""
    a, b, c = sorted(rng.integers(0, len(data) + 1, 3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


DAMAGE_OF_BYTES = (flip_bits, flip_one_bit, overwrite, zero, truncate, insert, delete, exchange)
