"""CRC-32C, Castagnoli's checksum (RFC 3720, appendix B.4), without a loop over bytes.

The register of a CRC is linear in the bits that it has taken in. So numpy takes in many
lanes of a text at once, each into a register of its own, and then joins neighbours: the
register of the left one goes on over as many zeros as the right one has bytes.
"""

import functools
from typing import Any, TypeAlias

import numpy as np

Registers: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
_POLYNOMIAL, _ONE, _BYTE = np.uint32(0x82F63B78), np.uint32(1), np.uint32(8)
_START = bytes.fromhex("54641f64")  # brings the register from 0 to where it begins
_LANE = 64  # bytes
_BITS: Registers = np.arange(32, dtype=np.uint32)


def crc32c(data: bytes) -> int:
    """Compute the checksum of some bytes."""
    text = np.frombuffer(_START + data, np.uint8)
    number = 1 << ((len(text) - 1) // _LANE).bit_length()  # of lanes
    lanes = np.zeros(number * _LANE, np.uint8)
    lanes[-len(text) :] = text  # zeros in front leave the register at 0
    found = np.zeros(number, np.uint32)
    for column in lanes.reshape(number, _LANE).T:
        found = _step(found ^ column)
    size = _LANE
    while len(found) > 1:
        found = _linear(_over_zeros(size), found[0::2]) ^ found[1::2]
        size *= 2
    return int(found[0]) ^ 0xFFFFFFFF


def _step(registers: Registers) -> Registers:
    """Let each register go on by a byte, which is combined with it already."""
    return _table()[registers & 0xFF] ^ (registers >> _BYTE)


@functools.cache
def _table() -> Registers:
    """Return where each value of a register below 256 gets by one byte."""
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = (found >> _ONE) ^ (found & _ONE) * _POLYNOMIAL
    return found


@functools.cache
def _over_zeros(number: int) -> Registers:
    """Return where each single bit of a register gets by this many zeros: 1, 2, 4..."""
    if number == 1:
        return _step(_ONE << _BITS)
    half = _over_zeros(number // 2)
    return _linear(half, half)


def _linear(images: Registers, registers: Registers) -> Registers:
    """Apply a linear map, which is given by the images of the single bits."""
    bits = (registers[:, None] >> _BITS) & _ONE
    return np.bitwise_xor.reduce(bits * images, axis=1)
