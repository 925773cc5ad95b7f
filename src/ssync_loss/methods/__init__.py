"""The methods beside SSync, one folder each: losses, parts of a model, and a slow reference."""
