"""SMTC: transport between frames, semantic and instance consistency, mask diversity, two-stage slot attention."""
