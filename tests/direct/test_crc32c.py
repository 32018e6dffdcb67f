"""The checksum, against its definition."""

import hypothesis.strategies as st
from hypothesis import given

from flaxckpt._direct.crc32c import crc32c


@given(st.binary(max_size=700))
def test_the_checksum_is_that_of_the_definition(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_the_checksum_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
