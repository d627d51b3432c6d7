"""The tiny federation of the federation's tests."""

from tests.federation.conftest import tiny, users_cache

__all__ = ["tiny", "users_cache"]
