"""Compile the kernels into a wheel, where there is a compiler; everything else is in pyproject.toml."""

import runpy
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Build the package, and the library of its kernels, which the package uses on processors such as this one.

    A failure is no error: the kernels are then compiled at first use, or not at all.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path("torchquant") / "kernels"
        compiler = runpy.run_path(str(folder / "_compiler.py"))
        try:
            if not compiler["is_switched_off"]():
                target = Path(self.build_lib) / folder / f"{compiler['key']()}.so"
                compiler["compile_library"](compiler["find_compiler"](), target)
        except Exception as error:
            sys.stderr.write(f"torchquant is built without compiled kernels: {error}\n")


setup(cmdclass={"build_py": BuildWithKernels})
