"""SRL: dense alignment of decoder and encoder, slot redundancy, temporal slot contrast."""
