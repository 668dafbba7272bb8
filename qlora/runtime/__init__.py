"""What a run stands on: the distributed processes, files written whole or not at all, the run folder, the console."""
