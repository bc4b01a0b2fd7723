"""Each case of the table on CUDA, as ``run.py`` tries it; see there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from suite.cases import CASES, Case
from suite.parity import begin, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_near_the_cpu(case: Case) -> None:
    begin("cuda")
    check(case, "cuda")
