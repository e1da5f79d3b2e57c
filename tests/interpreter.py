# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as the tests use it: products rounded once, and the language patched once per launch."""

import functools
import os

import numpy as np

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def prepare():
    """Does nothing where kernels are compiled, or Triton is missing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    round_dots_once(interpreter)
    patch_language_once(interpreter)
    check_overflow_in_one_step(interpreter)
    look_dtypes_up(interpreter)


def round_dots_once(interpreter):
    """Products in float64, rounded once, whatever the CPU.

    They are numpy's, and its BLAS sums float32 in an order that depends on the instruction set. With AVX2 (or
    OPENBLAS_CORETYPE=Haswell) a product and that of the transposed factors differ in their last bits, with older ones
    they do not, and of logits near overflow the last bit decides. A GPU's products are tested on a GPU.
    """
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if d.data.dtype != np.float32 or a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return plain(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_language_once(interpreter):
    """A launch replaces the functions of triton.language; the calls of device functions in it do so again, for nothing.

    Each goes through every name of the language: more than half of the interpreter's time.
    """
    plain, tl = interpreter._patch_lang, interpreter.tl

    @functools.cache
    def languages(fn):
        return [module for module in (tl, tl.core) if module in fn.__globals__.values()]

    def patch_lang(fn):
        unpatched = any(tl.core.is_builtin(module.load) for module in languages(fn))
        return plain(fn) if unpatched else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def check_overflow_in_one_step(interpreter):
    """That sums and products of integers fit their type, as the interpreter does with a dozen of its own operations."""

    def check(self, a, b, operation):
        a, b = a.handle.data, b.handle.data
        if a.dtype.itemsize == 8:
            return
        limits, name = np.iinfo(a.dtype), operation.__name__
        exact = OPERATIONS[name](a.astype(np.int64), b.astype(np.int64))
        if exact.size and (exact.min() < limits.min or exact.max() > limits.max):
            raise OverflowError(f"{a.dtype} overflow in {name}")

    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = check


def look_dtypes_up(interpreter):
    """numpy's type of each of Triton's, which the interpreter finds by building the table anew."""
    plain, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        key = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
        if key not in known:
            known[key] = plain(dtype)
        return known[key]

    interpreter._get_np_dtype = get_np_dtype
