"""What a run leaves behind for people: its manifest, its curves and its model card."""
