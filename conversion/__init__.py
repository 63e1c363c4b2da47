"""Everything that turns one form of a checkpoint into another."""
