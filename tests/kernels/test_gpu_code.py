"""The code that is made of each Triton kernel for an NVIDIA GPU computes as IEEE 754 says; nothing is run."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from tests.kernels.on_gpu import not_interpreted, triton

ASKED = dict.fromkeys(("INSIDE", "PACKS", "STRICT", "ADDS", "WANTS_X", "WANTS_STEP", "WANTS_OFFSET", "WANTS_END"), True)
EACH = dict.fromkeys(("STEP", "OFFSET", "END", "SCALE", "OTHER", "THIRD"), 1)
ARGUMENTS = dict.fromkeys(("LOW", "HIGH", "BELOW", "ABOVE", "UNIT", "LEAST", "MOST"), -1)
BYTES = ("bits", "inside", "above", "codes")
COUNTS = ("n", "inner", "channels", "size", "share", "n_bins")


def instructions(kernel: Any, dtype: str, **constants: Any) -> str:
    """Return the code of a kernel for an NVIDIA GPU of compute capability 8.0, in PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    known = {**EACH, **ARGUMENTS, "DELTA": 0, **ASKED, "WIDE": False, "ROWS": 64, **constants}
    constants = {name: value for name, value in known.items() if name in names}
    signature = {name: _type_of(name, names, constants, dtype) for name in names}
    source = ASTSource(kernel.fn if hasattr(kernel, "configs") else kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False, "num_warps": 2})
    return str(made.asm["ptx"])


def _type_of(name: str, names: list[str], constants: dict[str, Any], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    if constants.get(name.upper()) == -1:
        return "fp32"
    is_mask = name in BYTES and name.upper() not in names
    return "i32" if name in COUNTS else "*u8" if is_mask else "*i64" if name == "counts" else f"*{dtype}"


ROUNDS = ("_uniform", "_learned_step", "_differentiate", "_clip", "shifted_floats", "shifted_midrise")
"""Kernels and forms that divide and round."""
DIVIDES = (*ROUNDS, "_affine", "_to_codes", "powers_of_two", "_average", "_mix", "_differentiate_mix")
MEMBERS = (
    ("ternary", 0, 2, False, ()),
    ("powers_of_two", 2, 1, True, (8.0,)),
    ("floats", 3, 1, True, (0.25, 4.0, 0.5, 6.0)),
    ("shifted_floats", 4, 2, False, (0.25, 4.0, 0.5, 6.0)),
    ("midrise", 6, 2, True, (-8.0, 7.0)),
    ("shifted_midrise", 8, 3, True, (-8.0, 7.0)),
    ("uniform", 11, 3, True, ()),
    ("levels", 14, 16, True, ()),
)
"""A member of a mixture for each kernel: its name, its first row of numbers, rows, whether it clips, constants."""
AFFINE = {"N_STEPS": 255.0, "LEAST": 0.0, "MOST": 255.0, "LIMIT": 1.7e38, "LARGEST": 3.3e38}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpu_uniform._uniform", "fp32 fp64", {}),
    ("gpu_uniform._to_codes", "fp32 fp64", {}),
    ("gpu_uniform._from_codes", "fp32 fp64", {}),
    ("gpu_uniform._masked", "fp32 fp64 fp16 bf16", {}),
    ("gpu_affine._affine", "fp32 fp64", {**AFFINE, "SHIFTS": True}),
    ("gpu_affine._affine", "fp32 fp64", {**AFFINE, "SHIFTS": False}),
    ("gpu_learned._learned_step", "fp32 fp64", {}),
    ("gpu_learned._differentiate", "fp32 fp64", {"RULE": "_clamped_first"}),
    ("gpu_learned._differentiate", "fp32 fp64", {"RULE": "_rounded_first", "OFFSET": -2, "WANTS_OFFSET": False}),
    ("gpu_learned._differentiate", "fp32 fp64", {"RULE": "_calibrated", "OFFSET": -2, "WANTS_OFFSET": False}),
    ("gpu_learned._differentiate", "fp32", {"RULE": "_clamped_first", "ADDS": False}),
    ("gpu_learned._clip", "fp32 fp64", {}),
    ("gpu_learned._differentiate_clip", "fp32 fp64", {}),
    ("gpu_projections._project", "fp32", {"FORM": "signs", "CONSTANTS": ()}),
    ("gpu_projections._project", "fp32", {"FORM": "ternary", "CONSTANTS": ()}),
    ("gpu_projections._project", "fp32", {"FORM": "powers_of_two", "CONSTANTS": (8.0,)}),
    ("gpu_projections._project", "fp32", {"FORM": "shifted_floats", "CONSTANTS": (0.25, 4.0, 0.5, 6.0)}),
    ("gpu_projections._project", "fp32", {"FORM": "shifted_midrise", "CONSTANTS": (-8.0, 7.0)}),
    ("gpu_mixtures._mix", "fp32", {"MEMBERS": MEMBERS, "EACH": 1}),
    ("gpu_mixtures._differentiate_mix", "fp32", {"MEMBERS": MEMBERS, "EACH": 0, "WANTS_SHARES": True}),
    ("gpu_observers._ends", "fp32 fp64", {"TILE": 1}),
    ("gpu_observers._ends", "fp32", {"TILE": 32, "WIDE": True}),
    ("gpu_observers._average", "fp32 fp64", {"MOMENTUM": 0.9, "STARTS": True, "JOINS": True, "AT_ONCE": 512}),
    ("gpu_observers._histogram", "fp32 fp64", {"BINS": 2048, "WITH_ZEROS": False, "MAGNITUDE": True}),
]
"""File and name of a kernel, types of its elements, constants; a function among these by its name"""


@not_interpreted
@pytest.mark.parametrize(("kernel", "dtype", "constants"), [(k, t, c) for k, ts, c in CASES for t in ts.split()])
def test_compiled_code_computes_as_ieee_754_says(kernel: str, dtype: str, constants: dict[str, Any]) -> None:
    file, name = kernel.split(".")
    module, forms = (importlib.import_module(f"torchquant.kernels.{stem}") for stem in (file, "gpu_forms"))
    given = {
        key: getattr(module, value, None) or forms.FORMS[value] if isinstance(value, str) else value
        for key, value in constants.items()
    }
    code = instructions(getattr(module, name), dtype, **given)
    kind = "f64" if name == "_average" else dtype.replace("fp", "f")
    assert not re.search(r"\bdiv\.(full|approx)|\brcp\.|\bfma\.rn\.f|\.ftz\b|\b(atom|red)\.\S*\.f(16|32|64)", code)
    n_divisions = len(re.findall(rf"\bdiv\.rn\.{kind}\b", code))
    n_sums = len(re.findall(rf"\b(?:add|sub)\.(?:rn\.)?{kind}\b", code))
    form = constants.get("FORM", name)
    assert (n_divisions > 0) == (form in DIVIDES)
    if form in ROUNDS:
        assert n_sums >= 2 * n_divisions  # the two sums that round
