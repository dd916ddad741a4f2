"""What setup.cfg cannot say: the configs of the repository travel in the wheel as bnn_jax/configs/."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["bnn_jax*"]), "bnn_jax.configs"], package_dir={"bnn_jax.configs": "configs"})
