"""The commands of `odelt-fast`, one module each."""
