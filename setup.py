"""Two import packages from two folders, which setup.cfg cannot say; all metadata is there."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["hf_tokenseek*"]) + find_packages("kernels"),
    package_dir={"tokenseek_kernels": "kernels/tokenseek_kernels"},
)
