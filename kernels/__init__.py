"""Operations on packed bits: definitions, packed layouts, generated kernels. Knows nothing of graphs.

Importing any of it declares the operations to torch, as ``torch.ops.fqt``.
"""

from . import dispatch  # noqa: F401
