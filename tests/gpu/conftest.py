"""What tests on a GPU need before CUDA starts in their process."""

from qlora.runtime.determinism import fix_workspace

fix_workspace()  # or `trainer.deterministic` is refused
