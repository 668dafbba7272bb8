"""Everything about configuration, without torch: schema, composing, overrides, suggestions, help."""
