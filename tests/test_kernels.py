"""The kernels of the GPU path, checked without a GPU: interpreted, compiled, launches counted."""

import os
import subprocess
import sys
import tempfile
import unittest
from importlib.util import find_spec
from pathlib import Path

# Tests of the method that also run with the kernels, in the interpreter.
METHOD = [
    "test_importance.KthLargest.test_every_k_of_a_small_set",
    "test_importance.KthLargest.test_not_contiguous",
    "test_guarantee.Gradients",
    "test_guarantee.Regimes.test_autocast_with_a_scaler",
    "test_guarantee.Regimes.test_gradient_checkpointing",
    "test_maskfile.RoundTrip.test_other_defaults",
    "test_guarantee.Optimizers.test_low_and_double_precision",
    "test_guarantee.Optimizers.test_an_optimizer_per_parameter_that_steps_in_backward",
    "test_guarantee.Optimizers.test_steps_while_a_backward_pass_still_needs_the_other_weights",
]


@unittest.skipUnless(find_spec("triton"), "needs Triton, which is there for Linux only")
class Kernels(unittest.TestCase):
    def test_in_the_interpreter(self):
        command = [sys.executable, "-m", "unittest", "interpreted_kernels", *METHOD]
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_machine_code_keeps_everything_in_registers(self):
        """Compiled for a T4 and an H100 by the wheel's ptxas; no memory for spilled registers."""
        import triton
        from triton import language
        from triton.backends.compiler import GPUTarget

        from bitstack_nb import kernels

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        types = {"rows": "*i64", "blocks": "*i32", "counts": "*i64", "upper": "*i64"}
        for kernel in (kernels.zero_kernel, kernels.put_kernel, kernels.histogram_kernel):
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            constants = {"kind": language.int32, "block": kernels.BLOCK, "low": True}
            constants = {n: c for n, c in constants.items() if n in signature}
            source = triton.compiler.ASTSource(kernel, signature, constants)
            for capability in (75, 90):
                with self.subTest(kernel.__name__, capability=capability):
                    target = GPUTarget("cuda", capability, 32)
                    built = triton.compile(source, target, {"num_warps": kernels.WARPS})
                    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                        Path(file.name).write_bytes(built.asm["cubin"])
                        command = [tool, "-res-usage", file.name]
                        usage = subprocess.run(command, capture_output=True, text=True, check=True)
                    self.assertIn("STACK:0 ", usage.stdout)
                    self.assertIn("LOCAL:0 ", usage.stdout)


if __name__ == "__main__":
    unittest.main()
