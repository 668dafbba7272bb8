"""What a user can put right, as an exception."""

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qlora.errors import UserError

MISTAKES = (UserError, HydraException, OmegaConfBaseException)
"""Our own errors, and what Hydra and OmegaConf raise for an override or a config file."""
