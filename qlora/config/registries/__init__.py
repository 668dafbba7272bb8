"""What a config may name and others may add: the shipped names of each kind, without importing their modules."""
