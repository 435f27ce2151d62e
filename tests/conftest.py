"""Fixtures for all tests: see stores.py for stores and tiny.py for models."""

from tests.stores import fresh_store, migrated  # noqa: F401
