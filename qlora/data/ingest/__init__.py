"""From files, the hub and functions to rows."""
