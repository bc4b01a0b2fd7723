"""The mistakes of ``tests/mutations.py`` can still be made, and the tests that should notice them are there."""

from __future__ import annotations

import pytest

from tests.checkout import REPOSITORY
from tests.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.file)
def test_its_text_is_in_the_code_once(mutation: Mutation) -> None:
    assert (REPOSITORY / mutation.file).read_text(encoding="utf-8").count(mutation.text) == 1
    assert mutation.mistake != mutation.text
    assert all((REPOSITORY / test).exists() for test in mutation.tests)


def test_there_are_ten_and_each_in_a_package_of_its_own() -> None:
    assert len({mutation.file.split("/")[1] for mutation in MUTATIONS}) == len(MUTATIONS) == 10
