"""Says in one line that a Python is too old, before pip looks for dependencies. All else is in pyproject.toml."""

import sys

if sys.version_info < (3, 10):
    sys.exit("edgelm needs Python 3.10 or newer, this is %d.%d" % sys.version_info[:2])

import setuptools

setuptools.setup()
