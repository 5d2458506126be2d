"""The embedded model loaded twice: by diffusers, the reference, and by the native engine."""

from __future__ import annotations

import pytest

from tests.support import NANO
from tests.support.fake_cuda import driver  # noqa: F401 (fixtures)
from tests.support.reference import Reference
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import NativeModel, Options


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(NANO)


@pytest.fixture(scope="session")
def native() -> NativeModel:
    return load_model(NANO, Options())
