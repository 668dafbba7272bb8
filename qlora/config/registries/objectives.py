"""The training objectives that `loss.name` may name."""

from __future__ import annotations

GROUP = "qlora.objectives"
"""The entry points by which an installed package adds objectives."""
OBJECTIVES = {"sft": "qlora.objectives.sft:SupervisedFinetuning"}
"""The objectives of this package: by name the class, `module:Class`."""
