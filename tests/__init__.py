"""A package, so that the one of this name that kronfluence installs does not come first."""
