"""Every method of the table does what every method must do."""

import pytest
from table import ROWS

from rankine.method import Compressor, catalogue
from rankine.testing.suite import MethodChecks


@pytest.fixture(params=ROWS, ids=lambda row: row.id)
def row(request):
    """One row of the table."""
    return request.param


class TestTable(MethodChecks):
    """All checks on all rows."""


def test_every_method_that_the_pipeline_drives_is_in_the_table():
    driven = {name for name, cls in catalogue().items() if issubclass(cls, Compressor)}
    assert driven == {row.method for row in ROWS}
