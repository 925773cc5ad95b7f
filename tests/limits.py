"""What a version of torch or Triton cannot: such a test is skipped, and the table of versions says why.

A reason begins with the name and the version; `matrix.py` lists those.
"""

import pytest
import torch

MAPPING_IN_A_GRAPH = pytest.mark.skipif(
    not hasattr(torch._dynamo.variables, "UserDefinedTupleVariable"),
    reason="torch 2.6 does not unpack maps by ** inside of a compiled function",
)
