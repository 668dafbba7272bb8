"""What all tests share: nothing may reach for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
