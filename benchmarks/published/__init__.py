"""Published algorithms as the text of their papers states them, plainly, for peers that are not on PyPI."""
