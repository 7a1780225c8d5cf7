"""The library of kernels, compiled once per test run for each target of this processor; patient chat templates."""

from __future__ import annotations

import platform

import pytest
from llvmlite import binding

from edgelm.kernels.abi import SUPPORTED_FORMATS
from edgelm.kernels.compiler import compile_kernels
from edgelm.kernels.ir.targets import TARGETS
from edgelm.text import template_sandbox


@pytest.fixture(autouse=True)
def patient_templates(monkeypatch):
    """Raise the time limit of chat templates: a garbage collection of a large test process can exceed one second."""
    monkeypatch.setattr(template_sandbox, "RENDER_LIMIT_S", 60.0)


def runnable(target):
    """Return whether this processor supports a target."""
    features = binding.get_host_cpu_features()
    return target.triple.startswith(platform.machine()) and all(features.get(name) for name in target.features)


@pytest.fixture(scope="session", params=[target for target in TARGETS if runnable(target)], ids=lambda t: t.name)
def library(request, tmp_path_factory):
    """The operators of all formats, compiled for one target."""
    target = request.param
    file = tmp_path_factory.mktemp("kernels") / "kernels.so"
    features = ",".join(f"+{name}" for name in target.features)
    file.write_bytes(compile_kernels(target, SUPPORTED_FORMATS, "", features))
    return file
