from setuptools import setup

setup(
    name="handloom",
    version="0.1.0",
    package_dir={"handloom": "engine", "handloom.kernels": "kernels"},
    packages=["handloom", "handloom.kernels", "handloom.processors", "handloom.strategies"],
)
