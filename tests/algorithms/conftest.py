"""The tiny federation of the federation's tests, for algorithms that need a model."""

from tests.federation.conftest import tiny, users_cache

__all__ = ["tiny", "users_cache"]
