"""The verbs of the `curate` command, one file each; click appears here and in `curate.cli` only."""
