"""What is read of a database to learn its form."""

import pytest
import tensorstore

from flaxckpt._direct.sources import Database
from flaxckpt._direct.write import database_at


@pytest.mark.parametrize(
    ("number", "size", "reads"), [(40, 2000, True), (8, 2**20, False)]
)
def test_a_database_is_read_at_once_if_its_values_are_small(
    tmp_path, number, size, reads
):
    written = tensorstore.KvStore.open(database_at(tmp_path)).result()
    for i in range(number):
        written.write(f"w{i}/c/0", bytes(size)).result()
    store = Database(tmp_path)
    store.expect_all()
    assert len(store.keys) == number
    assert store._coming.keys() == (store.keys if reads else set())
