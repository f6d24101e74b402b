"""Everything static is in pyproject.toml; this file is where the native core's build step will hook in."""

from setuptools import setup

setup()
