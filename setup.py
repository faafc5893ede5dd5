"""Install the top-level ``kernels/`` folder as ``fishkern.kernels``; everything else stands in ``pyproject.toml``."""

from setuptools import find_packages, setup

setup(
    packages=sorted({*find_packages(include=["fishkern", "fishkern.*"]), "fishkern.kernels"}),
    package_dir={"fishkern.kernels": "kernels"},
)
