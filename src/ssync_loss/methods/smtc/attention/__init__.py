"""Parts of a model that find semantics in frames, and instances inside each semantic."""
