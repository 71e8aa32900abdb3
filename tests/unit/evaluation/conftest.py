import pytest

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.sandbox import check_sandbox


@pytest.fixture(scope="session")
def sandbox():
    """Programs can be kept apart from this machine; the test is skipped where they cannot."""
    try:
        check_sandbox()
    except LowRankKitError as error:
        pytest.skip(str(error))
