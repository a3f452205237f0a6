"""Operations on packed bits: definitions, packed layouts, generated kernels. Knows nothing of graphs."""
