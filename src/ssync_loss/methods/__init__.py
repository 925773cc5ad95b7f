"""The methods beside SSync, a folder each: losses, parts of a model, and a slow reference."""
