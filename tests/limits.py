"""Marks that skip tests which a version of torch or Triton cannot pass.

Each reason begins with a name and a version. `matrix.py` lists these reasons in the table of versions.
"""

import pytest
import torch

MAPPING_IN_A_GRAPH = pytest.mark.skipif(
    not hasattr(torch._dynamo.variables, "UserDefinedTupleVariable"),
    reason="torch 2.6 does not unpack maps by ** inside of a compiled function",
)
