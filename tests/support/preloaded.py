"""What processes of tests have imported (`processes`): Triton with functions to be interpreted.

Triton decides that when it is imported; without a GPU nothing else uses it.
"""

from __future__ import annotations

import contextlib
import os

from fqt_compile.kernels.gpu.codegen import INTERPRET

os.environ[INTERPRET] = "1"
with contextlib.suppress(ImportError):  # the tests that need it are skipped
    import triton  # noqa: F401
del os.environ[INTERPRET]

import torchvision  # noqa: F401
from torch._dynamo.trace_rules import get_torch_obj_rule_map

import fqt_compile.backend
import fqt_compile.inspect.compare  # noqa: F401

get_torch_obj_rule_map()  # imports what Dynamo asks for at its first graph
