"""Refuse an old Python in one line, before pip resolves dependencies. Everything else is in pyproject.toml."""

import sys

if sys.version_info < (3, 10):
    sys.exit("edgelm needs Python 3.10 or newer, this is %d.%d" % sys.version_info[:2])

import setuptools

setuptools.setup()
